"""A tiny folder like ImageNet-LT's, to rehearse and to test with: five classes of generated photographs.

    python tests/tiny_lists.py FOLDER
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = [40, 25, 12, 7, 4]  # training images of the five classes; 4 for validation and 6 for the test each


def picture(rng, width, height, colour):
    """A smooth random pattern around a colour, with noise."""
    coarse = rng.randint(0, 120, (6, 6, 3)) + colour
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(smooth).astype(int) + rng.randint(-12, 13, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make(root):
    """Lists, and train/ and val/ with a folder per class, of JPEGs of 60 to 110 pixels."""
    root, rng = Path(root), np.random.RandomState(0)
    colours = rng.randint(0, 120, (5, 3))
    for part, folder, counts in (("train", "train", COUNTS), ("val", "train", [4] * 5), ("test", "val", [6] * 5)):
        lines = []
        for c, n in enumerate(counts):
            (root / folder / f"n0{c}").mkdir(parents=True, exist_ok=True)
            for k in range(n):
                name = f"{folder}/n0{c}/{part}{k}.JPEG"
                picture(rng, *rng.randint(60, 111, 2), colours[c]).save(root / name, quality=95)
                lines.append(f"{name} {c}\n")
        (root / f"ImageNet_LT_{part}.txt").write_text("".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny_lists.py FOLDER")
    make(sys.argv[1])
