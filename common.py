"""What the scripts in methods/ share, so that their numbers can be compared. First what decides a number: the
data, the batches, the networks, the scores. Then what does not: flags, steps on a GPU, how a run is kept, the
table. Last, your own images and the large sets. No training loop is in here, and of the methods only what two
of them share.

    python common.py RUNS                      the table of the finished runs in a folder, or in a .jsonl file
    python common.py classes RUN               the accuracy of every class in a finished run
    python common.py predict RUN ROW IMAGE...  what a trained network sees in images, by a row of its table

A run is a folder, such as runs/lort-lort-cifar100-if100-seed0 ("natural" in place of if100: all images):

    <stage>.ckpt       while it is at work: what the same command needs to go on, bit for bit
    log.jsonl          one line per epoch
    weights.pt         the network, see Run.save_weights(); stage1.pt, the same after LORT's first stage
    test_logits.pt     its outputs for the test set, from which any other metric can be computed
    result.json        flags and scores, one line; written last: a run is finished if it has this file
"""
import argparse
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

RANK = int(os.environ.get("RANK", 0))         # torchrun sets these: which of the processes this is,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are

# ------------------------------------------------------------ 1 data

DATASETS = ("cifar10", "cifar100", "synthetic", "imagenet-lt", "inat18", "places-lt")
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # the usual constants, for CIFAR-100 too
CIFAR_STD = (0.2023, 0.1994, 0.2010)
FINGERPRINTS = {  # of the standard subsets: sha256 of the indices, first 16 digits
    "cifar10": {10: "a17d69f192b1cf6d", 50: "d7edcfaf02772bee",
                100: "4bf45bff8878d278", 200: "a88004a1d1361093"},
    "cifar100": {10: "b4fbf1bf0a7f3338", 50: "561fa940cc7d3551",
                 100: "e0d58a4d2700c460", 200: "2f00ccd33da379d5"}}


class Split(NamedTuple):
    images: torch.Tensor  # (N, H, W, 3) uint8, or an ImageFile
    labels: torch.Tensor  # (N,) int64
    mean: torch.Tensor    # (3,) float32; mean and std are of grey levels, 0..255
    std: torch.Tensor     # (3,)
    # of photographs to train on, which are here squashed to squares; else None and 0
    sizes: torch.Tensor | None = None  # (N, 2) width and height of the originals
    crop: int = 0         # pixels a side that the network sees
    jitter: float = 0.0   # of brightness, contrast and saturation


class Data(NamedTuple):
    train: Split
    val: Split | None
    test: Split
    counts: list   # training images per class
    classes: list  # their names
    subset: dict   # total and sha256 of the subset, before images are held out; content: sha256 of all labels
                   # and images (of files: of their names, and of your own also their lengths)


def data_folder(args):
    """--data-root, or if it is not given ./data, or the folder of your own images."""
    return Path(args.data_root or ("data" if args.dataset in DATASETS else args.dataset))


def exp_counts(n_max, num_classes, imb_factor):
    """Training images per class, head first: int(n_max * imb_factor ** (-c / (C - 1))), as LDAM-DRW has it
    (Cao et al. 2019)."""
    return [int(n_max * imb_factor ** (-c / max(num_classes - 1, 1))) for c in range(num_classes)]


def shuffled_classes(labels, num_classes, seed):
    """The indices of each class, shuffled class after class; with seed 0 as LDAM-DRW's global generator
    does."""
    rng = np.random.RandomState(seed)
    labels = np.asarray(labels)
    shuffled = []
    for c in range(num_classes):
        index = np.where(labels == c)[0]
        rng.shuffle(index)
        shuffled.append(index)
    return shuffled


def first_of_each(shuffled, counts):
    """The indices of the first counts[c] images of each shuffled class, as the standard subset is drawn."""
    return np.concatenate([index[:n] for n, index in zip(counts, shuffled)])


def cifar(name, root):
    """({"train": (images (N, 32, 32, 3) uint8, labels (N,)), "test": ...}, class names), read and if need be
    fetched by torchvision. A set that is missing or damaged even so is refused."""
    import torchvision
    source = getattr(torchvision.datasets, name.upper())
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = lock(root)  # one download, however many runs start at once
        train = source(root, train=True, download=True)
        test = source(root, train=False)
        os.close(handle)
    except Exception as error:  # torchvision raises many kinds
        folder = root / source.base_folder
        files = source.train_list + source.test_list + [[source.meta["filename"], source.meta["md5"]]]
        intact = torchvision.datasets.utils.check_integrity
        bad = [file for file, md5 in files if not intact(folder / file, md5)]
        fail(f"{folder}: missing or damaged: {', '.join(bad)}; the download failed ({error}): put "
             "torchvision's files there, or try --dataset synthetic, which needs none")
    parts = {"train": (train.data, np.array(train.targets)), "test": (test.data, np.array(test.targets))}
    return parts, train.classes


def synthetic():
    """Like cifar(): 20 classes, 250 training and 50 test images each. A class is a smooth random 16 x 16
    pattern; an image blends it with another class's and adds noise."""
    rng = np.random.RandomState(0)
    coarse = torch.from_numpy(rng.randn(20, 3, 4, 4))
    patterns = F.interpolate(coarse, 16, mode="bicubic").permute(0, 2, 3, 1).numpy()

    def draw(n):
        labels = np.repeat(np.arange(20), n)
        blend = rng.uniform(0, 0.5, (len(labels), 1, 1, 1))
        images = (1 - blend) * patterns[labels] + blend * patterns[rng.permutation(labels)]
        images = 128 + 40 * (images + 1.2 * rng.randn(*images.shape))
        return images.clip(0, 255).astype(np.uint8), labels

    return {"train": draw(250), "test": draw(50)}, [f"pattern {c}" for c in range(20)]


def mean_and_std(images):
    """(3,) each, of images (N, H, W, 3) uint8, in grey levels."""
    mean = images.mean((0, 1, 2))
    square = np.square(images, dtype=np.uint16).mean((0, 1, 2))  # 255^2 fits; floats would be large
    return mean, np.sqrt(np.maximum(square - mean**2, 1))                       # a channel may be constant


def long_tail(parts, args):
    """(parts, counts, subset): the standard subset of the training part, and a part "val" if --val-per-class
    asks for it. parts: {part: (images, or paths (N,), labels (N,))}; subset: see Data."""
    content = hashlib.sha256()
    for images, labels in parts.values():
        if images.dtype == object:  # paths
            content.update(names_and_lengths(images, args))
        else:
            content.update(np.ascontiguousarray(images))
        content.update(labels)

    # of each class, shuffled, the first counts[c] images
    images, labels = parts["train"]
    counts = np.bincount(labels).tolist()
    if args.imb_factor != "natural":
        counts = exp_counts(max(counts), len(counts), args.imb_factor)
    shuffled = shuffled_classes(labels, len(counts), args.subset_seed)
    for c, index in enumerate(shuffled):
        if len(index) < counts[c]:
            fail(f"--imb-factor {args.imb_factor}: class {c} has {len(index)} images, not {counts[c]}; try "
                 "--imb-factor natural")
    chosen = first_of_each(shuffled, counts)
    sha256 = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()[:16]
    standard = FINGERPRINTS.get(args.dataset, {}).get(args.imb_factor, sha256)
    if args.subset_seed == 0 and sha256 != standard:
        fail(f"the subset's sha256 is {sha256}, not the standard {standard}: these are other images")

    # validation images: those after the subset's; a class without spare images (the head) gives up its last
    n_val = args.val_per_class
    if n_val and "val" in parts:
        fail(f"--val-per-class {n_val}: {args.dataset} has validation images of its own")
    counts = [min(n, len(index) - n_val) for n, index in zip(counts, shuffled)]
    if min(counts) < 1:
        fail(f"class {np.argmin(counts)} would have no training image: lower --imb-factor or --val-per-class")
    if n_val:
        held_out = np.concatenate([index[n:n + n_val] for n, index in zip(counts, shuffled)])
        parts = parts | {"val": (images[held_out], labels[held_out])}
    train = first_of_each(shuffled, counts)
    parts = parts | {"train": (images[train], labels[train])}
    subset = {"total": len(chosen), "sha256": sha256, "content": content.hexdigest()[:16]}
    return parts, counts, subset


def on_device(parts, mean, std, device):
    """{part: Split} of {part: (images, labels)}."""
    mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
    std = torch.as_tensor(std, dtype=torch.float32, device=device)
    splits = {}
    for part, (images, labels) in parts.items():
        images = torch.as_tensor(images, device=device)
        labels = torch.as_tensor(labels, device=device)
        splits[part] = Split(images, labels, mean, std)
    return splits


def load_data(args, device):
    """Data: the long-tailed training set, the validation set if there is one, the whole test set."""
    if args.dataset == "synthetic":
        parts, classes = synthetic()
    elif args.dataset in FINGERPRINTS:
        parts, classes = cifar(args.dataset, data_folder(args))
    elif args.dataset in LISTS:
        parts, classes = listed_images(args)
    else:
        parts, classes = own_images(Path(args.dataset), data_folder(args))
    parts, counts, subset = long_tail(parts, args)
    if args.dataset == "synthetic":
        mean, std = mean_and_std(parts["train"][0])
        splits = on_device(parts, mean, std, device)
    elif args.dataset in FINGERPRINTS:
        mean, std = 255 * np.array(CIFAR_MEAN), 255 * np.array(CIFAR_STD)
        splits = on_device(parts, mean, std, device)
    else:
        splits = read_files(parts, args, device)
    return Data(splits["train"], splits.get("val"), splits["test"], counts, classes, subset)


def normalised_as(data, mean, std):
    """The same Data with another mean and std: a network is always fed as it was trained."""
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        if split is not None:
            split = split._replace(mean=mean.to(split.mean), std=std.to(split.std))
            data = data._replace(**{part: split})
    return data


# ------------------------------------------------------------ 2 batches

AT_ONCE = 2**25  # values that are augmented together, 128 MB as floats


def crop_flip(images, generator, pad=None):
    """A random window of the image in a black margin of `pad` pixels (an eighth of the image, 4 of 32, if
    None), randomly flipped: what torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip
    draw, for each image. (N, H, W, 3) uint8."""
    n, height, width, _ = images.shape
    if pad is None:
        pad = height // 8
    device = images.device
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=device)
    flipped = torch.rand(n, 1, 1, 1, generator=generator, device=device) < 0.5
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view, (N, 2 pad + 1, 2 pad + 1, 3, H, W)
    images = windows[torch.arange(n, device=device), top, left].permute(0, 2, 3, 1)
    return torch.where(flipped, images.flip(2), images)


def normalise(images, split):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels last in memory."""
    return ((images - split.mean) / split.std).permute(0, 3, 1, 2)


def batches(split, batch_size, generator, augment=crop_flip):
    """Yield an epoch of (x, labels): every image once, in random order, augmented. The last batch may be
    short; a last batch of one image is left out, since BatchNorm would take its statistics from it alone.

    With several processes (ranks) all draw the same order and the same random numbers, and each takes its
    share of every batch. For equal shares up to WORLD - 1 images, different ones each epoch, are left out.
    """
    order = torch.randperm(len(split.labels), generator=generator, device=generator.device)
    order = order[:len(order) // WORLD * WORLD]
    if batch_size > WORLD and len(order) % batch_size == WORLD:  # one image for each rank is left over
        order = order[:-WORLD]
    if split.sizes is not None:
        yield from photograph_batches(split, order, batch_size, generator)
        return
    n = max(1, AT_ONCE // (split.images[0].numel() * batch_size))  # batches that are augmented together
    for index in order.split(n * batch_size):
        images = normalise(augment(split.images[index], generator), split)
        for x, labels in zip(images.split(batch_size), split.labels[index].split(batch_size)):
            yield x[RANK::WORLD], labels[RANK::WORLD]


def take(split, index):
    """(n, H, W, 3) uint8, on the device of the labels. index (n,): on the host if the images are in a
    file."""
    if isinstance(split.images, ImageFile):
        images = split.images.read(index, pin=split.labels.is_cuda)
        return images.to(split.labels.device, non_blocking=True)
    return split.images[index]


# ------------------------------------------------------------ 3 networks, and what two methods share


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (option A: every second pixel, zeros as new
    channels)."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x):
        shortcut = x
        if self.stride == 2:
            half = self.new_channels // 2
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x)).add_(shortcut)  # in place: less memory to move
        return F.relu(x, inplace=True)


class ResNet32(nn.Module):
    """CIFAR's ResNet-32 (He et al. 2016): features (B, 64), 470,004 parameters for 100 classes. With
    last_norm the mean over the pixels is of normalised values, which have both signs (Menon et al. 2021)."""

    def __init__(self, num_classes, blocks=5, last_norm=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        layers, channels = [], 16
        for width in (16, 32, 64):
            for _ in range(blocks):
                layers.append(Block(channels, width, stride=1 if width == channels else 2))
                channels = width
        if last_norm:
            layers.append(nn.BatchNorm2d(channels))
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x):
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return self.blocks(x).mean((2, 3))


class ResNet34(nn.Module):
    """torchvision's ResNet-34 with a 3x3 stem and no max-pooling, as WB, EWB-FDR and LORT use it: features
    (B, 512)."""

    def __init__(self, num_classes):
        super().__init__()
        from torchvision.models import resnet34
        net = resnet34()
        conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.body = nn.Sequential(conv, net.bn1, net.relu, net.layer1, net.layer2, net.layer3, net.layer4)
        self.fc = nn.Linear(512, num_classes)

    def features(self, x):
        return self.body(x).mean((2, 3))


class Torchvision(nn.Module):
    """torchvision's network of that name, for 224 pixels: features (B, 2048)."""

    def __init__(self, num_classes, name):
        super().__init__()
        import torchvision
        self.body = getattr(torchvision.models, name)()
        self.fc = nn.Linear(self.body.fc.in_features, num_classes)
        self.body.fc = nn.Identity()

    def features(self, x):
        return self.body(x)


BACKBONES = {"resnet32": ResNet32, "resnet32_bn": partial(ResNet32, last_norm=True), "resnet34": ResNet34,
             "small": partial(ResNet32, blocks=1),
             "resnet50": partial(Torchvision, name="resnet50"),
             "resnet152": partial(Torchvision, name="resnet152"),
             "resnext50_32x4d": partial(Torchvision, name="resnext50_32x4d")}


def simplex_etf(num_classes, dim, generator):
    """(K, dim): rows of unit norm with pairwise cosine -1/(K-1), sqrt(K/(K-1)) (I - 11^T/K) U^T for a
    uniformly random U (dim, K) with orthonormal columns; K = num_classes."""
    if not 2 <= num_classes <= dim:
        fail(f"a simplex ETF of {num_classes} classes needs as many dimensions, not {dim}: choose a wider "
             "--backbone or --width")
    gauss = torch.randn(dim, num_classes, generator=generator, device=generator.device, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    u = q * r.diagonal().sign()                                                 # (dim, K)
    centred = torch.eye(num_classes).to(q) - 1 / num_classes                    # (K, K)
    return (math.sqrt(num_classes / (num_classes - 1)) * centred @ u.T).float()


def class_balanced_weights(counts, beta):
    """(K,) weights proportional to v_k = (1 - beta) / (1 - beta^n_k), with mean 1 (Cui et al. 2019). counts:
    the K n_k."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    v = (1 - beta) / (1 - beta ** n)
    return (v / v.mean()).float()


def log_one_minus_softmax(logits):
    """log(1 - p_j), p = softmax(logits), (B, K), exact where p_j is nearly 1 too: that can only be the
    largest one, whose 1 - p_j is the sum of the others."""
    total = logits.logsumexp(1, keepdim=True)                                   # (B, 1)
    rest = torch.log1p(-(logits - total).clamp(max=-0.5).exp())                 # right where p_j <= 1/2
    largest = F.one_hot(logits.argmax(1), logits.shape[1]).bool()               # (B, K)
    others = logits.masked_fill(largest, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(largest, others - total, rest)


def class_balanced_bce(logits, labels, weights):
    """WB's loss: the mean over i, j of c_y BCE(p_ij, [j = y]), p = softmax(logits). logits (B, K), labels y
    (B,), weights c (K,)."""
    own = F.one_hot(labels, logits.shape[1]).bool()                             # (B, K)
    bce = -torch.where(own, logits.log_softmax(1), log_one_minus_softmax(logits))
    return (weights[labels][:, None] * bce).mean()


@torch.no_grad()
def max_norm_(weight, delta):
    """WB's MaxNorm, in place: w_k <- w_k min(1, delta / |w_k|); weight (K, D)."""
    norm = weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return weight.mul_((delta / norm).clamp(max=1))


def max_norm_threshold(weight):
    """WB's Delta, a tenth of the way from the smallest to the largest row norm of stage 1; weight (K, D)."""
    low, high = weight.detach().norm(dim=1).aminmax()
    return low + 0.1 * (high - low)


# ------------------------------------------------------------ 4 evaluation


@torch.no_grad()
def features(net, split, flipped=False):
    """net.features(x) of the images or of their horizontal flips, (N, D) float32, in evaluation mode. Each
    rank computes its share, and all get the whole."""
    same_statistics(net)
    training = net.training
    net.eval()
    n = len(split.labels)
    at_once = 250 if isinstance(split.images, ImageFile) else 1000
    mine = []
    for index in torch.arange(RANK, n, WORLD).split(at_once):
        images = take(split, index)
        if split.sizes is not None:  # whole photographs: the test's view, the central crop
            sizes = split.sizes[index]
            extent = 7 / 8 * sizes.amin(1, keepdim=True) / sizes                # (n, 2)
            images = resample(images, (1 - extent) / 2, extent, split.crop)
        x = normalise(images, split)
        mine.append(net.features(x.flip(3) if flipped else x))
    net.train(training)
    feat = torch.cat(mine)
    if WORLD > 1:
        shares = feat
        feat = shares.new_zeros(n, shares.shape[1])
        feat[RANK::WORLD] = shares
        torch.distributed.all_reduce(feat)
    return feat


def shot_groups(counts):
    """{"all", "many" (> 100 training images), "medium" (20..100), "few" (< 20)} -> (C,) bool, which
    classes."""
    n = torch.as_tensor(counts)
    many, few = n > 100, n < 20
    return {"all": n >= 0, "many": many, "medium": ~many & ~few, "few": few}


def recalls(logits, labels, num_classes):
    """(C,) float64: percent of the images of each class that are recognised; NaN for a class without
    images."""
    hits = (logits.argmax(1) == labels).double().cpu()
    labels = labels.cpu()
    return 100 * torch.bincount(labels, hits, num_classes) / torch.bincount(labels, minlength=num_classes)


def report(logits, labels, counts):
    """Mean of the per-class recalls in percent, per shot group; None for a group without classes that have
    images. logits (N, C), labels (N,), counts: training images of the C classes."""
    recall = recalls(logits, labels, len(counts))
    scores = {}
    for name, group in shot_groups(counts).items():
        values = recall[group & ~recall.isnan()]
        scores[name] = values.mean().item() if len(values) else None
    return scores


# ------------------------------------------------------------ 5 flags, errors


def fail(message, code=2):
    """End with one line on stderr and this exit code, 2 for bad input, without a traceback."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def guard(main):
    """Call a script's main(). Ctrl-C, a full disk and a full memory end with one line too."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: the same command goes on from the last saved epoch", code=130)
    except OSError as error:
        fail(f"{error}; what was saved is intact")
    except (RuntimeError, MemoryError) as error:  # torch has several kinds
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        fail("out of memory: try --no-graph, or delete the run's folder and try a smaller --batch-size (or "
             "--width, --dim)")


def number(kind, low, high):
    """An argparse type: a number with low <= number < high. NaN is in no interval."""
    def number(text):  # argparse shows this name
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {high}), not {text}")
        return value
    return number


ONE_OR_MORE = number(int, 1, 10**6)
ZERO_OR_MORE = number(int, 0, 2**32)
POSITIVE = number(float, 1e-12, 1e12)
NOT_NEGATIVE = number(float, 0, 1e12)


def imbalance(text):
    """An argparse type: a factor, or 'natural'."""
    return text if text == "natural" else number(float, 1, math.inf)(text)


def dataset(text):
    """An argparse type: the name of a set, or the path of a folder; ./cifar10 is a folder."""
    if text in DATASETS:
        return text
    path = os.path.normpath(text)
    return f"./{path}" if path in DATASETS else path


def base_parser(doc):
    """The flags of every script. parse() sets their defaults to the paper's values."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument_group("common flags").add_argument
    add("--dataset", type=dataset, default="cifar100",
        help=f"{', '.join(DATASETS)}, or a folder of your own images")
    add("--data-root", help="folder of the data, ./data if not given; of your own lists the folder in which "
                            "their paths begin, that of the lists if not given")
    add("--imb-factor", type=imbalance, default=100.0,
        help="images of the largest class over those of the smallest; natural: all images")
    add("--subset-seed", type=ZERO_OR_MORE, default=0, help="which images are kept; 0: the standard subset")
    add("--val-per-class", type=ZERO_OR_MORE, default=0, help="validation images per class, never trained on")
    add("--image-size", type=number(int, 16, 4096), help="photographs: pixels a side of the network's input")
    add("--cache-size", type=number(int, 16, 4096), default=256,
        help="photographs: pixels a side of the copies from which the training crops are taken")
    add("--seed", type=ZERO_OR_MORE, default=0, help="of the initial weights, the order and the augmentation")
    add("--epochs", type=ONE_OR_MORE, help="of stage 1, if there are two")
    add("--batch-size", type=ONE_OR_MORE, help="images per step, of all ranks together")
    add("--lr", type=POSITIVE, help="peak learning rate")
    add("--weight-decay", type=NOT_NEGATIVE, help="of SGD")
    add("--backbone", choices=list(BACKBONES), help="network below the classifier")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto",
        help="auto: on a GPU from Ampere on tf32 for resnet32, resnet32_bn and small, bf16 for the others; "
             "elsewhere fp32. Weights are always fp32")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--deterministic", action="store_true", help="repeat bit for bit on a GPU too, more slowly")
    add("--no-graph", action="store_true", help="do not replay the steps as CUDA graphs")
    add("--eval-every", type=ZERO_OR_MORE, default=0, help="score the test set every N epochs and at the end")
    add("--out", default="runs", help="folder of the runs' folders")
    return parser


def parse(parser, argv, recipe, changes):
    """Parse argv, twice, since the defaults depend on it: they are the recipe, the paper's for CIFAR-100-LT,
    then changes[variant] (of lort.py changes[retrain]), then changes[dataset]; the later ones win.

    args.published: has every flag of the recipe the paper's value? Only then is the paper's number set beside
    ours. listed_images() and the scripts may lower it.
    """
    recipe = {"subset_seed": 0, "val_per_class": 0, "image_size": None} | recipe  # the papers have these too
    argv = sys.argv[1:] if argv is None else argv
    first = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    built_in = first.dataset in ("synthetic", *FINGERPRINTS)
    if first.dataset in LISTS and first.dataset not in changes and first.backbone is None:
        fail(f"there is no recipe for {first.dataset} here: give --backbone, and look at the other flags")
    for choice in ("variant", "retrain"):
        recipe |= changes.get(getattr(first, choice, None), {})
    recipe |= changes.get(first.dataset, {})
    parser.set_defaults(**recipe)
    if not built_in:
        parser.set_defaults(imb_factor="natural", val_per_class=0)
    args = parser.parse_args(argv)
    if built_in and args.image_size:
        fail(f"--image-size is for photographs, not for {args.dataset}")
    size = args.image_size or (224 if args.dataset in LISTS else 0)
    if not size:
        refuse_without_effect(parser, args, "small images", "cache_size")
    if size > args.cache_size:
        fail(f"--cache-size {args.cache_size} would blur images of --image-size {size}: raise it")
    args.published = all(getattr(args, flag) == value for flag, value in recipe.items())
    args.command = shlex.join(argv)
    return args


def refuse_without_effect(parser, args, situation, *names):
    """Refuse flags that were set but change nothing in this situation: a comparison of them would be none."""
    for name in names:
        if vars(args)[name] != parser.get_default(name):
            fail(f"--{name.replace('_', '-')} has no effect with {situation}")


# ------------------------------------------------------------ 6 steps, on a GPU and on several


def average(tensors):
    """Replace each tensor by its mean over the ranks."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    means = (flat / WORLD).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means):
        tensor.copy_(mean.view_as(tensor))


def same_statistics(net):
    """Give all ranks the running statistics of the first: BatchNorm itself is per rank."""
    if WORLD == 1:
        return
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


def leave_ranks():
    """Under torchrun, at the end of a run: leave the group of processes."""
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def set_lr(optimizer, lr):
    """In place: the learning rate is a tensor, which a captured step reads anew."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def captured(step, net, optimizer, enabled=True):
    """step(x, labels) -> loss as one CUDA graph per batch size; on a CPU, or if not enabled, step itself. Of
    several ranks, the same step with gradients averaged over them.

    The step must read nothing back to the host, and what changes between steps (the learning rate, a ramp,
    class weights) must be a tensor that is changed in place; the optimizer is SGD. Capturing leaves weights,
    buffers and momentum as they were. Where it fails, training goes on with step itself, from the same state.
    """
    if WORLD > 1:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        optimizer.register_step_pre_hook(lambda *_: average([p.grad for p in parameters]))
    if WORLD > 1 or not enabled or not next(net.parameters()).is_cuda:
        return step
    graphs = {}  # batch size -> replay(x, labels), or step where capturing failed
    stream = torch.cuda.Stream()

    def snapshot():
        weights = [value.clone() for value in net.state_dict().values()]
        momentum = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
        return weights, momentum

    def restore(weights, momentum):
        for value, before in zip(net.state_dict().values(), weights):
            value.copy_(before)
        for p, state in optimizer.state.items():  # a zero buffer is as good as none
            state["momentum_buffer"].copy_(momentum.get(p, torch.zeros_like(p)))

    def capture(static_x, static_labels):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: libraries choose their kernels, momentum buffers appear
            for _ in range(3):
                step(static_x, static_labels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = step(static_x, static_labels)

        def replay(x, labels):
            static_x.copy_(x)
            static_labels.copy_(labels)
            graph.replay()
            return loss.clone()
        return replay

    def capture_or_step(x, labels):
        """A replay that worked once, or step; the state is as it was."""
        before = snapshot()
        try:
            run = capture(x.clone(), labels.clone())
            run(x, labels)
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"batches of {len(x)} images are not captured as a CUDA graph, which is slower ({error})")
            run = step
        restore(*before)
        return run

    def captured_step(x, labels):
        if len(x) not in graphs:
            graphs[len(x)] = capture_or_step(x, labels)
        return graphs[len(x)](x, labels)
    return captured_step


# ------------------------------------------------------------ 7 the run

SAVE_EVERY = 30.0  # seconds
NO_INFLUENCE = ("out", "data_root", "no_graph", "published", "command")  # args that change no result
HELD = {}  # folder -> the lock of this process's run there: a notebook may call main() again


def save(path, content, every_rank=False):
    """Write text, or torch.save a dict, under another name and rename: the file is whole, or as it was
    before. Of several ranks only the first writes, unless every_rank."""
    if RANK and not every_rank:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, "utf-8")
        else:
            buffer = io.BytesIO()  # so that a full disk raises OSError, which torch.save does not
            torch.save(content, buffer)
            temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # if it did not get that far


def load(path):
    """The dict in a checkpoint, weights.pt or test_logits.pt; a missing, damaged or other file is refused."""
    try:
        if zipfile.ZipFile(path).testzip() is None:
            return dict(torch.load(path, "cpu", weights_only=True))
    except Exception:  # zipfile and torch.load raise many kinds; to the user they are one
        pass
    fail(f"{path} is missing (is the run finished?), damaged, or no checkpoint: delete it, or name another")


def same_flags(path, flags, wanted, remedy=""):
    """Refuse a file that was made with other flags than the wanted ones."""
    for name, value in sorted(wanted.items()):
        if flags.get(name) != value:
            flag = name.replace("_", "-")
            fail(f"{path} was made with --{flag} {flags.get(name)}, not {value}{remedy}")


@torch.no_grad()
def as_linear(classifier, dim, device):
    """An affine map from features (N, dim) to logits (N, C) as an nn.Linear; if it is one, itself."""
    if isinstance(classifier, nn.Linear):
        return classifier
    bias = classifier(torch.zeros(1, dim, device=device))                       # (1, C)
    weight = (classifier(torch.eye(dim, device=device)) - bias).T               # (C, dim)
    linear = nn.Linear(dim, len(weight), device=device)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias[0])
    return linear


def load_network(path, row=None):
    """(net, saved): the network in a run's weights.pt, in evaluation mode: its backbone, with the classifier
    of a row of the table, or the unadjusted one, as an nn.Linear. saved: the dict in the file
    (Run.save_weights())."""
    saved = load(path)
    try:
        net = BACKBONES[saved["flags"]["backbone"]](len(saved["classes"]))
        net.load_state_dict(saved["linear"])
    except (KeyError, TypeError, RuntimeError):
        fail(f"{path} is no weights.pt of a run")
    if row is not None:
        if row not in saved["rows"]:
            fail(f"{path} has the rows {', '.join(saved['rows'])}, not {row}")
        net.fc.load_state_dict(saved["rows"][row])
    return net.eval(), saved


def load_stage1(args, data, **wanted):
    """(net, data, flags) to go on from the weights.pt of --stage1: data normalised as that network was
    trained, and the flags of that run. Refused if its data, its network or the wanted flags differ."""
    net, saved = load_network(args.stage1)
    if saved["stage"] not in ("train", "stage1"):
        fail(f"{args.stage1} has a retrained classifier: give the network before that, stage1.pt of a lort "
             "run, or weights.pt of a wd run")
    same = ("imb_factor", "subset_seed", "image_size", "cache_size", "backbone")
    wanted |= {name: vars(args)[name] for name in same}
    same_flags(args.stage1, saved["flags"], wanted)
    if saved["content"] != data.subset["content"]:
        fail(f"{args.stage1} was trained on other images than {args.dataset} has")
    return net, normalised_as(data, saved["mean"], saved["std"]), saved["flags"]


def lock(folder, wait=True):
    """Keep other processes out of a folder, until os.close() of what is returned or the end of this
    process."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def choose_device(name):
    """The torch.device of --device; of several ranks, each one's GPU. One that is not there is refused."""
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in ("cpu", *gpus):
        fail(f"--device {name}: this machine has {', '.join(['cpu', *gpus])}")
    return torch.device(name)


def paper_number(paper, row, args):
    """What the paper has for a row, or None; only for the paper's own recipe.
    paper: {row: (how it was measured, source, {dataset: {imbalance factor: percent}})}."""
    if row not in paper or not args.published:
        return None
    reading, source, numbers = paper[row]
    percent = numbers.get(args.dataset, {}).get(args.imb_factor)
    if percent is None:
        return None
    return {"all": percent, "reading": reading, "source": source}


class Run:
    """A run: its folder (see the top of this file), its device, its random numbers, its progress, its rows of
    the table. paper: see paper_number()."""

    def __init__(self, args, method, variant, paper):
        self.args, self.method, self.variant, self.paper = args, method, variant, paper
        self.device = choose_device(args.device)
        self._set_arithmetic()
        self.flags = {name: value for name, value in vars(args).items() if name not in NO_INFLUENCE}
        self.flags |= {"device": self.device.type, "precision": self.precision}  # what 'auto' came to
        stage1 = getattr(args, "stage1", None)
        if stage1 is not None:  # the same name may hold another network when the run goes on
            if not Path(stage1).is_file():
                fail(f"--stage1 '{stage1}' is no file: give the weights.pt of a run")
            self.flags["stage1_sha256"] = hashlib.sha256(Path(stage1).read_bytes()).hexdigest()[:16]
        factor = args.imb_factor if args.imb_factor == "natural" else f"if{args.imb_factor:g}"
        dataset = os.path.basename(os.path.abspath(args.dataset))
        self.folder = Path(args.out, f"{method}-{variant}-{dataset}-{factor}-seed{args.seed}")
        self._enter_folder()
        self._join_ranks()
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)  # draws order and augmentation
        self.stage = "stage1"  # lort.py --stage1 saves stage1.pt before any epochs()
        self.history, self.best_test = [], None       # the lines of log.jsonl; see keep_best()
        self.rows = []                                # of the table
        self.logits, self.classifiers = {}, {}        # of each row: its test logits, its nn.Linear

    def _join_ranks(self):
        """Under torchrun: join the other processes, of which only the first prints."""
        if WORLD == 1:
            return
        if self.args.batch_size % WORLD:
            fail(f"--batch-size {self.args.batch_size} cannot be shared by {WORLD} processes")
        torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.machine = f"{WORLD} x {self.machine}"
        if RANK:
            sys.stdout = open(os.devnull, "w")

    def _set_arithmetic(self):
        """Precision and determinism; 'auto' as the help of --precision says."""
        gpu = self.device.type == "cuda"
        self.precision = self.args.precision
        if self.precision == "auto":
            self.precision = "fp32"
            if gpu and torch.cuda.get_device_capability(self.device)[0] >= 8:  # Ampere or later
                small = self.args.backbone in ("resnet32", "resnet32_bn", "small")
                self.precision = "tf32" if small else "bf16"
        if self.precision == "tf32" and not gpu:
            fail("--precision tf32 needs a GPU; a CPU has fp32 and bf16")
        threads = torch.get_num_threads()
        self.machine = "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"
        if gpu:
            torch.cuda.set_device(self.device)  # streams and graphs are made on the current device
            self.machine = torch.cuda.get_device_name()
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"   # convolutions; matrix products are fp32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on a GPU
        torch.use_deterministic_algorithms(self.args.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # True, the default, costs time

    def _enter_folder(self):
        """Make and lock the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if RANK == 0:
                folder = self.folder.resolve()
                if folder in HELD:
                    os.close(HELD.pop(folder))
                HELD[folder] = lock(folder, wait=False)
        except BlockingIOError:
            fail(f"{self.folder} is in use by another process: wait for it, or choose another --out")
        except OSError as error:
            fail(f"--out {self.args.out}: cannot write there ({error.strerror})")

    def _end_if_finished(self):
        """If the folder holds this run's result, print it and end. That of another run is refused."""
        path = self.folder / "result.json"
        if path.exists():
            result, = load_results(path)
            self._same_run(path, result)
            print(f"{self.folder} is finished; delete the folder to run it again\n{table([result])}")
            leave_ranks()
            raise SystemExit(0)

    def _same_run(self, path, saved):
        """Refuse what another run has left in this folder."""
        flags = saved.get("flags", {})
        remedy = ": choose another --out, or delete the folder"
        if flags.get("stage1_sha256") != self.flags.get("stage1_sha256"):
            fail(f"{path} was made with another --stage1, or without one{remedy}")
        paths = ("stage1", "dataset")  # they may have been moved; what they hold is compared
        wanted = {name: value for name, value in self.flags.items() if name not in paths}
        same_flags(path, flags, wanted, remedy)
        if saved["subset"] != self.data.subset:
            fail(f"{path} is of other images: the data have changed; delete the folder to start again")

    def begin(self, data, net, augmentation="crop, flip"):
        """Print what is trained on what; end here if the run is finished. augmentation: only printed."""
        self.data = data
        self._end_if_finished()
        self.params = sum(p.numel() for p in net.parameters())
        groups = shot_groups(data.counts)
        groups = ", ".join(f"{groups[name].sum()} {name}" for name in groups)
        names = data.classes
        if len(names) > 6:
            names = names[:3] + ["..."] + names[-3:]
        held_out = len(data.val.labels) if data.val else 0
        if data.train.sizes is not None:
            augmentation = "RandomResizedCrop, flip" + ", ColorJitter" * (data.train.jitter > 0)
        print(f"{self.method}, {self.variant}, {self.args.dataset} -> {self.folder}")
        print("  subset:     {total:,} images, sha256 {sha256}".format(**data.subset))
        n, largest, smallest = sum(data.counts), max(data.counts), min(data.counts)
        print(f"  training:   {n:,} images, {largest} to {smallest} per class")
        print(f"  classes:    {groups}: {', '.join(names)}")
        print(f"  held out:   {held_out:,} for validation, {len(data.test.labels):,} for the test")
        print(f"  network:    {self.args.backbone}, {self.params:,} parameters")
        print(f"  batches:    {self.args.batch_size} images, {augmentation}")
        print(f"  arithmetic: {self.precision} on {self.machine}, seed {self.args.seed}", flush=True)

    def autocast(self):
        """For the forward pass: bf16 where --precision says so. Losses are computed outside of it, in
        fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def captured(self, step, net, optimizer):
        return captured(step, net, optimizer, enabled=not self.args.no_graph)

    def epochs(self, stage, total, net, optimizer):
        """Yield the epochs of a stage that are still to do; the script ends each of them with log().

        The state is saved after the last epoch, and after every one that ends SAVE_EVERY seconds or more
        after the last save. What came after that is lost when the process is stopped.
        """
        self.stage, self.total, self.optimizer, self.best_test = stage, total, optimizer, None
        first = self._resume(net) if self._checkpoint().exists() else 0
        saved = time.monotonic()
        hidden = True if RANK else None  # None: where there is no terminal
        self.bar = tqdm(range(first, total), stage, total, initial=first, unit="epoch", disable=hidden)
        for self.epoch in self.bar:
            self.began = time.monotonic()
            yield self.epoch
            same_statistics(net)
            if self.epoch + 1 == total or time.monotonic() - saved > SAVE_EVERY:
                self._save(net)
                saved = time.monotonic()

    def _checkpoint(self):
        return self.folder / f"{self.stage}.ckpt"  # one per stage: stage 2 goes on from both

    def _save(self, net):
        lines = [json.dumps(line) + "\n" for line in self.history]
        save(self.folder / "log.jsonl", "".join(lines))  # first; killed between, these lines are made again
        save(self._checkpoint(), {
            "flags": self.flags,
            "subset": self.data.subset,
            "net": net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch + 1,
            "history": self.history,
            "best_test": self.best_test})

    def _resume(self, net):
        """Load the stage's checkpoint; returns the number of epochs done."""
        path = self._checkpoint()
        state = load(path)
        self._same_run(path, state)
        try:
            net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError):
            fail(f"{path} does not fit this version of the script: delete the folder to start again")
        for group in self.optimizer.param_groups:  # load_state_dict() leaves the rate on the CPU
            group["lr"] = group["lr"].to(self.device)
        self.generator.set_state(state["generator"])
        self.history, self.best_test = state["history"], state["best_test"]
        print(f"  {self.stage}: resumed after epoch {state['epoch']} of {self.total}", flush=True)
        return state["epoch"]

    def log(self, losses, **extra):
        """End an epoch. losses: the 0-d losses of its steps; one that is not finite ends the run. extra: for
        log.jsonl."""
        loss = torch.stack(losses).mean()
        if WORLD > 1:
            average([loss])
        loss = loss.item()
        lr = self.optimizer.param_groups[0]["lr"].item()
        seconds = time.monotonic() - self.began
        done = self.epoch + 1
        if not math.isfinite(loss):
            fail(f"the loss is {loss} in epoch {done} of {self.stage}: delete {self.folder} and try a lower "
                 "--lr, or --precision fp32")
        line = {"stage": self.stage, "epoch": done, "loss": loss, "lr": lr, "seconds": seconds}
        self.history.append(line | extra)
        speed = len(self.data.train.labels) / seconds
        text = f"loss {loss:.4f}, lr {lr:.4g}, {speed:.0f} images/s"
        left = (self.total - done) * seconds
        self.bar.set_postfix_str(text)
        if self.bar.disable and done % max(1, self.total // 10) == 0:  # no terminal: lines instead of a bar
            print(f"  {self.stage}, epoch {done} of {self.total}: {text}, {left:.0f} s left", flush=True)
        if done == 1 and left > 1200 and self.device.type == "cpu":
            print(f"  without a GPU {self.stage} takes about {left / 3600:.1f} hours", flush=True)
            if self.precision == "fp32":
                print("  --precision bf16 halves that on a processor with bf16 instructions", flush=True)

    def eval_due(self):
        """Does --eval-every N ask for the test set now? After every N epochs and the last one; never if N is
        0."""
        every, done = self.args.eval_every, self.epoch + 1
        return every > 0 and (done % every == 0 or done == self.total)

    def keep_best(self, logits, **extra):
        """Keep the best test accuracy of this stage, which many papers report. logits (N, C); extra: for
        log.jsonl."""
        accuracy = report(logits, self.data.test.labels, self.data.counts)["all"]
        self.best_test = max(self.best_test or 0.0, accuracy)
        self.history[-1] |= extra

    def compute_test_features(self, net):
        """Of the test images and their horizontal flips, for score() and finish(). Every fc here is an affine
        map, so the logits of a mean feature are the mean logits."""
        self.feat = features(net, self.data.test)                               # (N, D)
        flipped = features(net, self.data.test, flipped=True)
        self.feat_flip = (self.feat + flipped) / 2
        self.classifiers = {}  # those of earlier rows may be this net.fc itself, trained on since

    @torch.no_grad()
    def score(self, row, classifier, best_test=None, strength=None):
        """Add a row to the table. classifier: the affine map from features (N, D) to the logits (N, C) to be
        scored. best_test: see keep_best(); strength: of a post-hoc adjustment in it."""
        labels, counts = self.data.test.labels, self.data.counts
        logits = classifier(self.feat)
        if not logits.isfinite().all():
            fail(f"the test logits are not finite: delete {self.folder} and try a lower --lr")
        self.rows.append({
            "row": row,
            "acc": report(logits, labels, counts),
            "acc_flip": report(classifier(self.feat_flip), labels, counts),
            "best_test": best_test,
            "strength": strength,
            "paper": paper_number(self.paper, row, self.args)})
        if logits.numel() > 2**25:  # ImageNet-LT and iNaturalist 2018: 0.2 and 0.8 GB in fp32
            logits = logits.half()
        self.logits[row] = logits.cpu()
        self.classifiers[row] = as_linear(classifier, self.feat.shape[1], self.device)

    def save_weights(self, path, net, flags):
        """What a network needs to be used. stage: the last in which it was trained; linear: the backbone with
        an nn.Linear as fc, for load_network(); rows: the nn.Linear of each row of the table; view, size,
        mean, std: how images are shown to it."""
        data, test = self.data, self.data.test
        fc = as_linear(net.fc, self.feat.shape[1], self.device)
        linear = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
        linear |= {"fc.weight": fc.weight.detach(), "fc.bias": fc.bias.detach()}
        save(path, {
            "stage": self.stage,
            "net": net.state_dict(),
            "linear": linear,
            "rows": {row: classifier.state_dict() for row, classifier in self.classifiers.items()},
            "flags": flags,
            "classes": data.classes,
            "content": data.subset["content"],
            "view": "central" if isinstance(test.images, ImageFile) else "squashed",
            "size": test.images.shape[1],
            "mean": test.mean,
            "std": test.std})

    def finish(self, net, headline=None, **metrics):
        """Keep the weights, the test logits and, last, the result. headline: the row that the paper is about,
        the last one if not given; metrics: more for result.json."""
        args, data = self.args, self.data
        headline = headline or self.rows[-1]["row"]
        labels = data.test.labels.cpu()
        if torch.bincount(labels).unique().numel() > 1:  # else it is the mean of the recalls
            hits = self.logits[headline].argmax(1) == labels
            metrics["overall accuracy"] = 100 * hits.double().mean().item()
        if data.val:  # by which flags may be chosen
            logits = self.classifiers[headline](features(net, data.val))
            metrics["val"] = report(logits, data.val.labels, data.counts)
        seconds = sum(line["seconds"] for line in self.history)
        memory = torch.cuda.max_memory_allocated() >> 20 if self.device.type == "cuda" else None
        result = {
            "method": self.method,
            "variant": self.variant,
            "dataset": args.dataset,
            "imb_factor": args.imb_factor,
            "seed": args.seed,
            "headline": headline,
            "rows": self.rows,
            "metrics": metrics,
            "command": f"methods/{self.method}.py {args.command}".strip(),
            "flags": self.flags,
            "subset": data.subset,
            "params": self.params,
            "seconds": round(seconds, 1),
            "peak_memory_mb": memory,
            "device": self.machine,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d")}
        result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN
        self.save_weights(self.folder / "weights.pt", net, self.flags)
        save(self.folder / "test_logits.pt", {
            "logits": net.fc(self.feat).detach().to(self.logits[headline]),
            "labels": labels,
            "counts": torch.tensor(data.counts),
            "classes": data.classes,
            "rows": self.logits,
            "strengths": {row["row"]: row["strength"] for row in self.rows}})
        save(self.folder / "result.json", json.dumps(result) + "\n")
        if RANK == 0:  # not before the first rank has written the result
            for path in self.folder.glob("*.ckpt"):
                path.unlink()
        for name, value in result["metrics"].items():
            print(f"  {name}: {value}")
        print(table([result]))
        leave_ranks()


# ------------------------------------------------------------ 8 results

NOT_IN_TABLE = r" --(seed|out|device|data-root|eval-every)[ =]('[^']*'|\S+)"  # flags of a command


def load_results(path):
    """The results in every result.json below a folder, or in the lines of a file."""
    results = []
    files = [path]
    if path.is_dir():
        names = sorted(glob.glob("**/result.json", root_dir=path, recursive=True))          # follows links
        files = [path / name for name in names]
    for file in files:
        try:
            lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
            table(lines)  # raises if a field is missing
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{file}: no results ({type(error).__name__}: {error})")
        results += lines
    if not results:
        fail(f"{path}: no finished run is there")
    return results


def plus_minus(values):
    """Mean ± standard deviation (n - 1) as text; None is left out."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.1f}"
    return text


def duration(seconds):
    """As text, with two digits."""
    unit, size = ("s", 1) if seconds < 60 else ("min", 60) if seconds < 3600 else ("h", 3600)
    rounded = float(f"{seconds / size:.2g}")
    return f"{rounded:g} {unit}"


def all_but_seed(result):
    """Text that is equal for runs that differ in nothing but the seed."""
    flags = result["flags"] | dict.fromkeys(("seed", "eval_every", "stage1_sha256"))
    flags["stage1"] = re.sub(r"seed\d+", "seed", flags.get("stage1") or "")
    return json.dumps([flags, result["subset"], result["device"]], sort_keys=True)


def table(results):
    """Markdown, a table for each data set. A line is the mean ± standard deviation of runs that differ in
    nothing but the seed."""
    columns = ["method", "row", "paper", "ours", "many / medium / few", "flip", "seeds", "time", "command"]
    sets = {}  # data set -> what the runs of a line have in common -> the run -> (result, row)
    for result in results:
        factor = result["imb_factor"]
        imbalance = factor if factor == "natural" else f"factor {factor:g}"
        lines = sets.setdefault(f"{result['dataset']}, imbalance: {imbalance}", {})
        for row in result["rows"]:
            line = result["method"], row["row"], all_but_seed(result)
            run = result["seed"], result["flags"].get("stage1_sha256")
            lines.setdefault(line, {})[run] = result, row

    text, sources = [], []
    for title, lines in sets.items():
        text += ["", title, "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        above = None
        for (method, name, _), runs_and_rows in lines.items():
            runs = [result for result, _ in runs_and_rows.values()]
            rows = [row for _, row in runs_and_rows.values()]
            paper = rows[0]["paper"]
            reference = "-"
            if paper:
                if paper["source"] not in sources:
                    sources.append(paper["source"])
                footnote = sources.index(paper["source"]) + 1
                reference = f"{paper['all']} {paper['reading']}".strip() + f" [{footnote}]"
            scores = {}
            for group in rows[0]["acc"]:
                scores[group] = plus_minus([row["acc"][group] for row in rows])
            command = re.sub(NOT_IN_TABLE, "", runs[0]["command"])
            cells = [
                method,
                name,
                reference,
                scores["all"],
                "{many} / {medium} / {few}".format(**scores),
                plus_minus([row["acc_flip"]["all"] for row in rows]),
                " ".join(str(run["seed"]) for run in runs),
                f"{duration(np.mean([run['seconds'] for run in runs]))}, {runs[0]['device']}",
                "as above" if command == above else f"`{command}`"]
            text.append("| " + " | ".join(cells) + " |")
            above = command
    for k, source in enumerate(sources):
        text += ["", f"[{k + 1}] {source}"]
    return "\n".join(text[1:])


@torch.no_grad()
def classify(net, saved, paths):
    """(len(paths), C) probabilities of image files, in the test's view; net, saved: from load_network()."""
    images, own = [], saved["flags"]["dataset"] not in LISTS
    for path in paths:
        try:
            images.append(square(open_image(path, own), saved["view"], saved["size"]))
        except ValueError as error:
            fail(f"{path}: {error}")
    images = torch.from_numpy(np.stack(images))
    split = Split(images, torch.zeros(len(images)), saved["mean"], saved["std"])
    return net.fc(features(net, split)).softmax(1)


def print_predictions(run, row, paths):
    """The five most probable classes of images."""
    file = "stage1.pt" if row == "stage 1" else "weights.pt"
    net, saved = load_network(Path(run, file), row)
    for path, probabilities in zip(paths, classify(net, saved, paths)):
        words = []
        for c in probabilities.argsort(descending=True)[:5].tolist():
            words.append(f"{saved['classes'][c]} {100 * probabilities[c]:.1f} %")
        print(f"{path}: {', '.join(words)}")


def print_classes(run):
    """The accuracy of every class, in every row of the table."""
    saved = load(Path(run, "test_logits.pt"))
    labels, num_classes = saved["labels"], len(saved["classes"])
    scores = [recalls(logits, labels, num_classes) for logits in saved["rows"].values()]
    print("| class | training images | " + " | ".join(saved["rows"]) + " |")
    print("| --- " * (2 + len(scores)) + "|")
    for c, name in enumerate(saved["classes"]):
        cells = [f"{score[c]:.1f}" for score in scores]
        print(f"| {name} | {saved['counts'][c]} | {' | '.join(cells)} |")


# ------------------------------------------------------------ 9 your own images and the large sets

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Lists(NamedTuple):
    name: str      # the lists are NAME_train.txt and so on, of lines `path label`
    test: str      # the list that results are reported on
    known: tuple   # the standard files: git's ids of their contents, first 8 digits
    jitter: float  # of brightness, contrast and saturation in training
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD


LISTS = {
    "imagenet-lt": Lists("ImageNet_LT", "test", ("a063f095", "3ed3188b", "76a2fb97", "bdc443f8"), 0.4),
    "places-lt": Lists("Places_LT", "test", ("6392252f", "1d608b55", "b93a2ca5", "89c29c09", "e732e58b",
                                             "d43400ac"), 0.4),
    "inat18": Lists("iNaturalist18", "val", ("4accdb75", "4c239008"), 0.0,  # there is no other test set
                    (0.466, 0.471, 0.380), (0.195, 0.194, 0.192))}

PARTS = {"train": ("train",), "test": ("test",), "val": ("val", "valid", "validation")}  # names of your own


def read_list(path, root):
    """[(path below root, label)] of a file of lines `path label`."""
    pairs = []
    for line in path.read_text("utf-8-sig", "replace").splitlines():
        words = line.rsplit(maxsplit=1)
        if len(words) == 2:
            pairs.append((root / words[0].strip(), words[1]))
        elif words:
            fail(f"{path} needs lines `path label`, not '{line}'")
    return pairs


def image_files(folder, part, root):
    """[(path, class name)] of your own images, [] if there is no such part: of a folder `part` with a folder
    per class, or of a list `*part.txt`, whose paths lie below root."""
    from PIL import Image
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in entries if path.is_dir() and path.name.lower() in PARTS[part]]
    endings = tuple(f"{name}.txt" for name in PARTS[part])
    lists = [path for path in entries if path.name.lower().endswith(endings)]
    if part == "val" and not folders + lists:
        return []
    if len(folders + lists) != 1:
        names = ", ".join(path.name for path in entries[:9])
        fail(f"{folder} needs one folder {part}/ with a folder per class, or one list *{part}.txt of lines "
             f"`path label`, not {len(folders)} and {len(lists)}; it has {names}")
    if lists:
        return read_list(lists[0], root)
    files, others = [], []
    for entry in sorted(folders[0].glob("[!.]*")):
        if not entry.is_dir():
            others.append(entry)
            continue
        names = sorted(glob.glob("**/*", root_dir=entry, recursive=True))       # follows links, skips dots
        found = [entry / name for name in names if not os.path.isdir(entry / name)]
        images = [path for path in found if path.suffix.lower() in Image.registered_extensions()]
        if found and not images:
            fail(f"class {entry} has no file of a type that Pillow reads, only such as {found[0].name}")
        files += [(path, entry.name) for path in images]
        others += sorted(set(found) - set(images))
    if others:
        print(f"left out: {len(others)} files that are no images, such as {others[0]}")
    return files


def own_images(folder, root):
    """Like cifar(), with paths in place of images: your own, maybe with a part "val". Classes are numbered by
    their training images, the largest first."""
    if not folder.is_dir():
        fail(f"--dataset {folder}: not one of {', '.join(DATASETS)}, and no such folder")
    files = {part: image_files(folder, part, root) for part in ("train", "test", "val")}
    names = {part: Counter(name for _, name in listed) for part, listed in files.items()}
    classes = sorted(names["train"], key=lambda name: (-names["train"][name], name))
    if len(classes) < 2:
        fail(f"{folder}: training images of two classes are needed, not of {len(classes)}")
    for part, needed in (("train", names["test"] | names["val"]), ("test", names["train"])):
        missing = sorted(needed.keys() - names[part].keys())
        if missing:
            fail(f"{folder}: class {missing[0]} has no {part} images")
    number_of = {name: c for c, name in enumerate(classes)}
    parts = {}
    for part, listed in files.items():
        if listed:
            paths = [path for path, _ in listed]
            labels = [number_of[name] for _, name in listed]
            parts[part] = np.array(paths), np.array(labels)
    return parts, classes


def listed_images(args):
    """Like own_images(): a data set of the standard lists, which lie in --data-root as the images do. Classes
    are numbered as in the lists and named by the folders of the training images. Lowers args.published if a
    list is not the standard one."""
    lists, root = LISTS[args.dataset], data_folder(args)
    parts, names = {}, {}
    for part, name in (("train", "train"), ("test", lists.test), ("val", "val")):
        path = root / f"{lists.name}_{name}.txt"
        if part == "val" and (name == lists.test or not path.exists()):
            continue
        try:
            content = path.read_bytes()
            listed = read_list(path, root)
            labels = np.array([int(label) for _, label in listed])
            if not listed:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            fail(f"{args.dataset} needs {path} with lines `path label`: {error}")
        parts[part] = np.array([file for file, _ in listed]), labels
        names = {int(label): file.parent.name for file, label in listed} | names  # those of the first win
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if blob[:8] not in lists.known:
            print(f"{path} is not the standard list: no paper's number stands beside the result")
            args.published = False
    expected = list(range(len(names)))
    for part in ("train", "test"):
        found = np.unique(parts[part][1]).tolist()
        if found != expected:
            fail(f"{root}: the labels of the {part} list are not 0 to {len(names) - 1}, each with images")
    listed = {part: set(paths) for part, (paths, _) in parts.items()}
    for one, other in combinations(listed, 2):
        leaked = listed[one] & listed[other]
        if leaked:
            fail(f"{root}: {len(leaked)} images are in both the {one} and the {other} list, such as "
                 f"{min(leaked)}")
    return parts, [names[c] for c in expected]


class ImageFile:
    """(N, S, S, 3) uint8 in a file. What is read of it does not stay in this process's memory."""

    def __init__(self, path, n, side):
        self.file = open(path, "rb")
        self.shape = n, side, side, 3

    def read(self, index, pin=False):
        """The images of index (n,) as a tensor on the host."""
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8, pin_memory=pin)
        for image, k in zip(images.numpy(), index.tolist()):
            os.preadv(self.file.fileno(), [image], k * image.nbytes)
        return images


def open_image(path, own=True):
    """An image file as a Pillow image in RGB; your own are turned as their EXIF says, which no loader of the
    large sets does. Raises ValueError."""
    from PIL import Image, ImageOps
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":
            raise ValueError("16-bit and float pixels: convert them to 8 bits")
        if own:
            with suppress(Exception):  # a damaged EXIF block; Pillow then takes it for an empty one
                image.getexif()
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"cannot be read as an image ({error})") from None


def square(image, kind, side):
    """(side, side, 3) uint8 of a Pillow image. kind: "exact", it is such a square; "squashed"; "central",
    torchvision's Resize(8/7 side) and CenterCrop(side), 256 and 224. Raises ValueError."""
    from torchvision.transforms import functional
    if kind == "central":
        image = functional.center_crop(functional.resize(image, side * 8 // 7), side)
    elif kind == "squashed":
        image = functional.resize(image, (side, side), functional.InterpolationMode.BICUBIC)
    elif image.size != (side, side):
        raise ValueError(f"{image.width} x {image.height} pixels, not {side} x {side}: give --image-size")
    return np.asarray(image)


def names_and_lengths(paths, args):
    """Bytes that change if the files do: their names and, of your own, their lengths."""
    root = data_folder(args)
    lengths = []
    if args.dataset not in LISTS:
        lengths = [path.stat().st_size for path in paths if path.exists()]
    names = [os.path.relpath(path, root) for path in paths]
    return str([names, lengths]).encode()


def write_squares(file, length, paths, kind, side, own):
    """Write the squares of all images, length bytes, to a file, one after the other. Returns the [width,
    height] of each original and a digest of its pixels. If some cannot be read, one line names them."""
    try:
        os.posix_fallocate(file.fileno(), 0, length)
    except OSError as error:
        fail(f"{file.name}: the decoded images take {length / 1e9:.2g} GB ({error.strerror})")

    def read(k):
        try:
            image = open_image(paths[k], own)
            pixels = square(image, kind, side)
        except ValueError as error:
            return None, f"{paths[k]}: {error}"
        os.pwrite(file.fileno(), pixels.tobytes(), k * pixels.nbytes)
        return image.size, hashlib.sha256(image.tobytes()).hexdigest()[:16]

    done = thread_map(read, range(len(paths)), desc="reading", disable=None)
    errors = [text for size, text in done if size is None]
    if errors:
        some = "; ".join(errors[:3])
        fail(f"{some} ({len(errors)} of {len(done)} images; those of lists lie below --data-root)")
    return [size for size, _ in done], [digest for _, digest in done]


def cached_squares(paths, kind, side, args):
    """(ImageFile, sizes, digests): write_squares() into a file in .cache, unless that was done before."""
    own = args.dataset not in LISTS
    folder = data_folder(args) / ".cache"
    times = [path.stat().st_mtime_ns for path in paths if own and path.exists()]
    key = f"{kind} {side} {times}".encode() + names_and_lengths(paths, args)
    name = hashlib.sha256(key).hexdigest()[:16]
    pixels = folder / f"{name}.pixels"
    index = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock(folder)  # one process decodes, the others wait
    try:
        length = len(paths) * side * side * 3
        if not (index.exists() and pixels.exists() and pixels.stat().st_size == length):  # the index is last
            index.unlink(missing_ok=True)
            with open(pixels, "wb") as file:
                found = write_squares(file, length, paths, kind, side, own)
            save(index, json.dumps(found), every_rank=True)
    except BaseException:  # Ctrl-C too: without its index the file only takes room
        pixels.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    sizes, digests = json.loads(index.read_text())
    return ImageFile(pixels, len(paths), side), sizes, digests


def small_squares(parts, args, device):
    """({part: Split}, digests) of {part: (paths, labels)}: images of one small size, read into memory."""
    first = parts["train"][0][0]
    try:
        side = open_image(first).width
    except ValueError as error:
        fail(f"{first}: {error} (images of lists lie below --data-root)")
    if not 16 <= side <= 256:  # of one photograph, before all are read
        fail(f"{first} has {side} pixels a side: small images have 16 to 256, for others give --image-size")
    images, digests = {}, {}
    for part, (paths, labels) in parts.items():
        file, _, digests[part] = cached_squares(paths, "exact", side, args)
        images[part] = file.read(np.arange(len(paths))).numpy(), labels
    mean, std = mean_and_std(images["train"][0])
    return on_device(images, mean, std, device), digests


def photographs(parts, args, device):
    """({part: Split}, digests) of {part: (paths, labels)}: those for training squashed, with the sizes of the
    originals, to be cropped on the device; the others as the test sees them."""
    lists = LISTS.get(args.dataset, Lists("", "", (), 0.0))  # your own have ImageNet's mean and std
    mean = 255 * torch.tensor(lists.mean, device=device)
    std = 255 * torch.tensor(lists.std, device=device)
    crop = args.image_size or 224
    splits, digests = {}, {}
    for part, (paths, labels) in parts.items():
        labels = torch.as_tensor(labels, device=device)
        if part == "train":
            images, sizes, digests[part] = cached_squares(paths, "squashed", args.cache_size, args)
            sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
            splits[part] = Split(images, labels, mean, std, sizes, crop, lists.jitter)
        else:
            images, _, digests[part] = cached_squares(paths, "central", crop, args)
            splits[part] = Split(images, labels, mean, std)
    return splits, digests


def read_files(parts, args, device):
    """{part: Split} of {part: (paths, labels)}. Your own images are small squares, or photographs if
    --image-size is given."""
    if args.dataset in LISTS:
        return photographs(parts, args, device)[0]
    read = photographs if args.image_size else small_squares
    splits, digests = read(parts, args, device)
    seen, same = {}, []
    for part, (paths, labels) in parts.items():
        for path, label, digest in zip(paths, labels, digests[part]):
            first = seen.setdefault(digest, (path, part, label))
            if first[1:] != (part, label):  # it would make the scores wrong
                same.append(f"{path} in {part} and {first[0]} in {first[1]}")
    if same:
        fail(f"the same picture: {'; '.join(same[:3])} ({len(same)} in all)")
    return splits


def photograph_batches(split, order, batch_size, generator):
    """batches() of photographs: RandomResizedCrop, horizontal flip and ColorJitter."""
    order_on_host = order.cpu()  # once an epoch, so that no batch waits for the GPU
    for index, on_host in zip(order.split(batch_size), order_on_host.split(batch_size)):
        draws = torch.rand(len(index), 22 + 1 + 6, generator=generator, device=order.device)
        box, flip, colours = draws[RANK::WORLD].split((22, 1, 6), dim=1)
        index = index[RANK::WORLD]
        start, extent = crop_boxes(box, split.sizes[index])
        images = take(split, on_host[RANK::WORLD])
        x = resample(images, start, extent, split.crop, flipped=flip[:, 0] < 0.5)
        if split.jitter:
            x = colour_jitter(x, colours, split.jitter)
        yield normalise(x, split), split.labels[index]


def crop_boxes(u, sizes):
    """RandomResizedCrop's boxes as torchvision draws them: 8 to 100 % of the area, aspect ratio 3/4 to 4/3,
    of ten draws the first that fits, else the largest central one. u (n, 22) in [0, 1): ten areas, ten
    ratios, x and y; sizes (n, 2).
    Returns where the boxes start and what they extend over, (n, 2) each, as parts of the width and height."""
    area = sizes.prod(1, keepdim=True) * (0.08 + 0.92 * u[:, :10])              # (n, 10)
    ratio = (4 / 3) ** (2 * u[:, 10:20] - 1)                                    # (n, 10)
    widths = (area * ratio).sqrt().round()
    heights = (area / ratio).sqrt().round()
    extents = torch.stack([widths, heights], 2)                                 # (n, 10, 2)
    fits = ((extents > 0) & (extents <= sizes[:, None])).all(2)                 # (n, 10)
    first = fits.byte().argmax(1)
    drawn = extents[torch.arange(len(sizes), device=u.device), first]           # (n, 2)
    central = torch.minimum(sizes, sizes.flip(1) * 4 / 3).round()
    any_fits = fits.any(1, keepdim=True)
    extent = torch.where(any_fits, drawn, central)
    room = sizes - extent
    start = torch.where(any_fits, u[:, 20:22] * (room + 1), room / 2).floor()
    return start / sizes, extent / sizes


def resample(images, start, extent, size, flipped=None):
    """Pillow's resize(box=), bilinear with antialiasing, of a box of each image: (n, S, S, 3) uint8 -> (n,
    size, size, 3) float in 0..255, as two matrix products. start, extent (n, 2): x and y of the box, as parts
    of the side; flipped (n,)."""
    side = images.shape[1]
    pixel = torch.arange(side, device=images.device) + 0.5                      # (S,)
    grid = (torch.arange(size, device=images.device) + 0.5) / size              # (size,)
    weights = []
    for k in (0, 1):  # x, y
        at = grid.expand(len(images), size)
        if k == 0 and flipped is not None:
            at = torch.where(flipped[:, None], 1 - grid, grid)
        centre = side * (start[:, k, None] + extent[:, k, None] * at)           # (n, size)
        width = (side / size * extent[:, k]).clamp(min=1)  # (n,) of the triangular filter
        w = (1 - (pixel - centre[..., None]).abs() / width[:, None, None]).clamp(min=0)
        weights.append(w / w.sum(2, keepdim=True))                              # (n, size, S)
    return torch.einsum("nyxc,niy,njx->nijc", images.float(), weights[1], weights[0])


def colour_jitter(x, u, strength):
    """torchvision's ColorJitter(s, s, s): brightness, contrast and saturation in an order drawn for each
    image, cut to whole numbers as Pillow does. x (n, H, W, 3) in 0..255; u (n, 6) in [0, 1): three for the
    order, three for the factors."""
    order = u[:, :3].argsort(1)                                                 # (n, 3)
    factors = 1 + strength * (2 * u[:, 3:] - 1)                                 # (n, 3)
    for step in (0, 1, 2):
        kind = order[:, step].view(-1, 1, 1, 1)
        factor = factors.gather(1, kind.view(-1, 1)).view(-1, 1, 1, 1)
        red, green, blue = x.split(1, dim=3)                                    # (n, H, W, 1) each
        grey = (0.299 * red + 0.587 * green + 0.114 * blue).round()
        mean = grey.mean((1, 2), keepdim=True).round()
        base = torch.where(kind == 1, mean, grey)
        base = torch.where(kind == 0, 0.0, base)
        x = (base + factor * (x - base)).clamp(0, 255).floor()
    return x


def main():
    words = sys.argv[1:]
    if words[:1] == ["predict"] and len(words) > 3:
        print_predictions(words[1], words[2], words[3:])
    elif words[:1] == ["classes"] and len(words) == 2:
        print_classes(words[1])
    elif len(words) == 1 and words[0][:1] not in ("", "-"):
        print(table(load_results(Path(words[0]))))
    else:
        fail("usage: python common.py RUNS, or classes RUN, or predict RUN ROW IMAGE...")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for: python common.py runs | head
    guard(main)
