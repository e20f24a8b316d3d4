import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait for each other

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import common

SCRIPTS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))

whole_synthetic = common.synthetic
PARTS, CLASSES = whole_synthetic()


def fewer_images():
    """The generated set with 125 of 250 training images and 17 of 50 test images a class, so that the tests take minutes."""
    images, labels = PARTS["train"]
    train = images[::2].copy(), labels[::2].copy()
    images, labels = PARTS["test"]
    third = np.arange(len(labels)) % 50 % 3 == 0
    return {"train": train, "test": (images[third], labels[third])}, CLASSES


common.synthetic = fewer_images


@pytest.fixture
def call(tmp_path):
    """call("rbl", "--epochs", 1, ...) runs a script's main() here, on the synthetic set, and returns its exit code."""
    def call(script, *flags, out=tmp_path / "runs"):
        module = __import__(script)
        argv = ["--dataset", "synthetic", "--device", "cpu", "--out", out, *flags]
        with pytest.raises(SystemExit) as stop:
            common.guard(lambda: module.main([str(flag) for flag in argv]))
            raise SystemExit(0)
        return stop.value.code
    return call


def results(out):
    """{folder name: its result} of the finished runs in a folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))}


def result(out):
    only, = results(out).values()
    return only


def saved(out, name="weights.pt"):
    """What torch saved in the only run of a folder."""
    path, = out.glob(f"*/{name}")
    return common.load(path)


def log_of(out):
    """The lines of log.jsonl of the only run of a folder."""
    path, = out.glob("*/log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def refused(call, capsys):
    """Run a script that must refuse: exit code 2, one line on stderr, which holds every one of `words`."""
    def refused(script, *flags, words=(), **kwargs):
        assert call(script, *flags, **kwargs) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in words), (words, lines[0])
    return refused
