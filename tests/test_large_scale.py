"""Photographs and the standard lists, on generated JPEGs; one process and several."""
import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as tf
from PIL import Image

import common
import rbl
from conftest import ROOT, result, results, same, saved
from tiny_lists import COUNTS, make, picture

CPU = torch.device("cpu")

@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("in-lt")
    make(root)
    return root


def arguments(root, *flags):
    args = common.base_parser("").parse_args(["--dataset", "imagenet-lt", "--data-root", str(root), *map(str, flags)])
    return SimpleNamespace(**vars(args) | {"imb_factor": "natural", "published": True})


FLAGS = ("--image-size", 32, "--cache-size", 48)


# ---- lists

def test_lists_are_read_as_they_are(photos, capsys):
    args = arguments(photos, *FLAGS)
    data = common.load_data(args, CPU)
    assert data.counts == COUNTS and data.classes == [f"n0{c}" for c in range(5)]
    assert data.train.images.shape == (88, 48, 48, 3) and data.val.images.shape == (20, 32, 32, 3)
    assert data.test.images.shape == (30, 32, 32, 3) and torch.bincount(data.test.labels).tolist() == [6] * 5
    assert (data.train.crop, data.train.jitter) == (32, 0.4)
    assert torch.allclose(data.train.mean / 255, torch.tensor([0.485, 0.456, 0.406]))
    assert torch.allclose(data.train.std / 255, torch.tensor([0.229, 0.224, 0.225]))
    assert capsys.readouterr().out.count("is not the standard list") == 3 and not args.published


def test_the_standard_list_is_recognised(photos, monkeypatch, capsys):
    known = []
    for part in ("train", "test", "val"):
        content = (photos / f"ImageNet_LT_{part}.txt").read_bytes()
        known.append(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()[:8])  # as git names it
    lists = common.LISTS["imagenet-lt"]._replace(known=tuple(known))
    monkeypatch.setitem(common.LISTS, "imagenet-lt", lists)
    args = arguments(photos, *FLAGS)
    common.load_data(args, CPU)
    assert args.published and "not the standard" not in capsys.readouterr().out


def test_inat18_is_tested_on_its_val_list(photos, tmp_path):
    for name in ("train", "val"):
        os.symlink(photos / name, tmp_path / name)
    (tmp_path / "iNaturalist18_train.txt").write_text((photos / "ImageNet_LT_train.txt").read_text())
    (tmp_path / "iNaturalist18_val.txt").write_text((photos / "ImageNet_LT_test.txt").read_text())
    args = arguments(tmp_path, *FLAGS)
    args.dataset = "inat18"
    data = common.load_data(args, CPU)
    assert data.val is None and len(data.test.labels) == 30 and data.train.jitter == 0


def test_the_images_lie_in_data_if_nothing_else_is_said(photos, tmp_path, monkeypatch):
    os.symlink(photos, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    args = arguments("data", *FLAGS)
    given = common.load_data(args, CPU).subset
    decoded = sorted(photos.glob(".cache/*"))
    args.data_root = None
    assert common.load_data(args, CPU).subset == given == common.load_data(arguments(photos, *FLAGS), CPU).subset
    assert decoded and sorted(photos.glob(".cache/*")) == decoded  # nothing is decoded again


def test_classes_are_named_by_the_folders_of_the_training_images(photos, tmp_path):
    (tmp_path / "ImageNet_LT_train.txt").write_text((photos / "ImageNet_LT_train.txt").read_text())
    (tmp_path / "ImageNet_LT_test.txt").write_text("".join(f"val/{c}.JPEG {c}\n" for c in range(5)))
    assert common.listed_images(arguments(tmp_path))[1] == [f"n0{c}" for c in range(5)]


@pytest.mark.parametrize("how, word", [("no list", "ImageNet_LT_train.txt"), ("no label", "lines `path label`"),
                                       ("a gap", "not 0 to"), ("a class not in test", "test list are not 0 to 4"),
                                       ("empty", "it is empty"), ("tested on", "1 images are in both"),
                                       ("val is test", "both the test and the val list"),
                                       ("an image gone", "1 of 30 images"),
                                       ("flat val", "30 of 30 images"), ("not an image", "cannot be read")])
def test_a_broken_folder_is_one_line(refused, photos, tmp_path, how, word):
    lists = {part: (photos / f"ImageNet_LT_{part}.txt").read_text() for part in ("train", "val", "test")}
    os.symlink(photos / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    for path in photos.glob("val/*/*"):
        target = tmp_path / "val" / (path.name if how == "flat val" else path.relative_to(photos / "val"))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    if how == "no list":
        del lists["train"]
    if how == "no label":
        lists["train"] += "train/n00/train0.JPEG cat\n"
    if how == "a gap":
        lists["train"] += "train/n00/train0.JPEG 9\n"
    if how == "a class not in test":
        lists["test"] = "".join(line + "\n" for line in lists["test"].splitlines() if not line.endswith(" 4"))
    if how == "empty":
        lists["val"] = ""
    if how == "tested on":
        lists["test"] += lists["train"].splitlines()[0]
    if how == "val is test":
        lists["val"] = lists["test"]
    if how == "an image gone":
        (tmp_path / "val/n00/test0.JPEG").unlink()
    if how == "not an image":
        (tmp_path / "val/n00/test0.JPEG").write_text("x")
    for part, text in lists.items():
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text(text)
    refused("hinge_ce", "--dataset", "imagenet-lt", "--data-root", tmp_path, *FLAGS, words=[word])


# ---- decoding

@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (91, 400), (224, 300), (57, 61), (1000, 100)])
def test_the_test_view_is_torchvisions(size):
    image = picture(np.random.RandomState(0), *size, 60)
    expected = tf.center_crop(tf.resize(image, 256), 224)
    assert (common.square(image, "central", 224) == np.asarray(expected)).all()


def test_images_are_decoded_once_and_anew_after_an_interruption(photos, tmp_path, monkeypatch):
    paths = sorted(photos.glob("val/*/*.JPEG"))
    opened, real = [], common.open_image

    def counted(path, own):
        opened.append(path)
        if len(opened) == 17:
            raise KeyboardInterrupt
        return real(path, own)
    args = arguments(tmp_path)
    monkeypatch.setattr(common, "open_image", counted)
    with pytest.raises(KeyboardInterrupt):
        common.cached_squares(paths, "central", 32, args)
    assert not list(tmp_path.glob(".cache/*.pixels"))
    images, sizes, digests = common.cached_squares(paths, "central", 32, args)
    assert len(opened) >= 17 + 30 and len(set(digests)) == 30
    for k in (0, 7, 29):
        image = Image.open(paths[k])
        assert tuple(sizes[k]) == image.size
        assert (images.read(np.array([k]))[0].numpy() == common.square(image.convert("RGB"), "central", 32)).all()
    before = len(opened)
    common.cached_squares(paths, "central", 32, args)
    assert len(opened) == before
    pixels, = tmp_path.glob(".cache/*.pixels")
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:5000])  # a copy that is cut off
    common.cached_squares(paths, "central", 32, args)
    assert len(opened) == before + 30 and pixels.read_bytes() == whole
    pixels.unlink()
    opened[:] = [None] * 5  # interrupted again, with the index of the last time at hand
    with pytest.raises(KeyboardInterrupt):
        common.cached_squares(paths, "central", 32, args)
    common.cached_squares(paths, "central", 32, args)
    assert pixels.read_bytes() == whole


def test_two_processes_decode_once(photos, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import common, pathlib
real = common.square
def counted(*words):
    print("decoded")
    return real(*words)
common.square = counted
args = common.base_parser("").parse_args(["--dataset", "imagenet-lt", "--data-root", {str(tmp_path)!r}])
common.cached_squares(sorted(pathlib.Path({str(photos)!r}).glob("val/*/*.JPEG")), "central", 32, args)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate(timeout=300)[0].count("decoded") for process in processes) == [0, 30]


# ---- crops on the device

def test_boxes_are_drawn_as_torchvision_draws_them():
    for width, height in ((500, 375), (300, 300), (800, 300)):
        sizes = torch.tensor([[width, height]]).float().expand(40000, 2)
        start, extent = common.crop_boxes(torch.rand(40000, 22, generator=torch.Generator().manual_seed(0)), sizes)
        ours = torch.cat([start, extent], 1) * sizes.repeat(1, 2)
        torch.manual_seed(0)
        image = torch.zeros(3, height, width)
        theirs = torch.tensor([T.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(8000)])
        theirs = theirs[:, [1, 0, 3, 2]].float()  # top, left, height, width -> x, y
        for q in (0.02, 0.25, 0.5, 0.75, 0.98):
            assert ((ours.quantile(q, 0) - theirs.quantile(q, 0)).abs() < 0.025 * max(width, height)).all()
        assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= sizes + 1e-3).all()
    long = torch.tensor([3000.0, 100.0])  # no box fits: torchvision takes the central 4 : 3
    start, extent = common.crop_boxes(torch.rand(50, 22), long.expand(50, 2))
    assert torch.allclose(extent * long, torch.tensor([133.0, 100.0]))
    assert torch.allclose(start * long, torch.tensor([1433.0, 0.0]))


def test_resampling_is_pillows_to_one_grey_level():
    rng, side, worst = np.random.RandomState(0), 64, 0
    image = picture(rng, side, side, 60)
    images = torch.from_numpy(np.asarray(image).copy())[None]
    for size in (24, 40, 80):
        for _ in range(20):
            width, height = rng.randint(10, side + 1, 2)
            x, y = rng.randint(0, side - width + 1), rng.randint(0, side - height + 1)
            box = torch.tensor([[x, y, width, height]]) / side
            ours = common.resample(images, box[:, :2], box[:, 2:], size)[0]
            theirs = np.asarray(image.crop((x, y, x + width, y + height)).resize((size, size), Image.BILINEAR))
            margin = size // min(width, height) + 1  # Pillow does not look beyond the box
            inner = np.abs(ours.numpy() - theirs)[margin:-margin, margin:-margin]
            worst = max(worst, inner.max())
            flipped = common.resample(images, box[:, :2], box[:, 2:], size, torch.tensor([True]))[0]
            assert torch.allclose(flipped, ours.flip(1), atol=1e-3)
    assert worst < 1.2
    whole = common.resample(images, torch.zeros(1, 2), torch.ones(1, 2), side)
    assert torch.allclose(whole[0], images[0].float(), atol=1e-3)


def test_colour_jitter_is_torchvisions():
    rng, n = np.random.RandomState(0), 60
    x = torch.from_numpy(np.stack([np.asarray(picture(rng, 32, 32, rng.randint(0, 120, 3))) for _ in range(n)])).float()
    u = torch.rand(n, 6, generator=torch.Generator().manual_seed(0))
    ours, differences, operations = common.colour_jitter(x, u, 0.4), [], (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation)
    for k in range(n):
        image = Image.fromarray(x[k].byte().numpy())
        for kind in u[k, :3].argsort().tolist():
            image = operations[kind](image, 1 + 0.4 * (2 * u[k, 3 + kind].item() - 1))
        differences.append(np.abs(ours[k].numpy() - np.asarray(image)))
    assert np.mean(differences) < 0.01 and np.max(differences) <= 3


def test_training_photographs_are_flipped_and_jittered_and_scored_by_their_central_crop(photos, monkeypatch):
    train, boxes, flips, jitters = common.load_data(arguments(photos, *FLAGS), CPU).train, [], [], []

    def resample(images, start, extent, size, flipped=None):
        boxes.append(torch.cat([start, extent], 1))
        flips.append(flipped)
        return images[:, :size, :size].float()

    def jitter(x, u, strength):
        jitters.append((len(u), strength))
        return x
    monkeypatch.setattr(common, "resample", resample)
    monkeypatch.setattr(common, "colour_jitter", jitter)
    sizes = [len(labels) for _, labels in common.batches(train, 16, torch.Generator().manual_seed(0))]
    assert jitters == [(n, 0.4) for n in sizes] and 0.3 < torch.cat(flips).double().mean() < 0.7
    boxes.clear()
    common.features(common.BACKBONES["small"](5), train)
    start, extent = torch.cat(boxes).split(2, dim=1)
    sides = 7 / 8 * train.sizes.min(1, keepdim=True).values.expand(-1, 2)
    assert torch.allclose(extent * train.sizes, sides) and torch.allclose(2 * start + extent, torch.ones(88, 2))


# ---- ranks

@pytest.mark.parametrize("kind", ["small", "photographs"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_batches_together_are_those_of_one(photos, monkeypatch, kind, world):
    if kind == "small":
        args = common.base_parser("").parse_args(["--dataset", "synthetic"])
        split = common.load_data(args, CPU).train
    else:
        split = common.load_data(arguments(photos, *FLAGS), CPU).train
    n = len(split.labels) // world * world
    split = split._replace(labels=split.labels[:n])  # else the ranks leave some out and one process does not
    if kind == "small":
        split = split._replace(images=split.images[:n])

    def epoch(rank, ranks):
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "WORLD", ranks)
        return list(common.batches(split, 12 * world, torch.Generator().manual_seed(0)))
    one = epoch(0, 1)
    shares = [epoch(rank, world) for rank in range(world)]
    assert all(len(share) == len(one) for share in shares)
    for step, (x, labels) in enumerate(one):
        for rank in range(world):
            assert torch.equal(x[rank::world], shares[rank][step][0])
            assert torch.equal(labels[rank::world], shares[rank][step][1])


def test_ranks_have_equal_shares_and_see_every_image_in_turn(monkeypatch):
    images = torch.arange(103, dtype=torch.uint8)[:, None, None, None].expand(103, 4, 4, 3)
    split = common.Split(images, torch.arange(103), torch.zeros(3), torch.ones(3))
    monkeypatch.setattr(common, "WORLD", 4)
    seen = []
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        shares = list(common.batches(split, 20, torch.Generator().manual_seed(0), lambda images, generator: images))
        assert [len(x) for x, _ in shares] == [5] * 5  # 103 images: 100 in full batches, 3 left out
        seen += torch.cat([labels for _, labels in shares]).tolist()
    assert len(seen) == len(set(seen)) == 100


RUN = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/methods"]
import torch
torch.set_num_threads(1)
{before}
import common, {script}
{after}
common.guard(lambda: {script}.main({argv!r}))
"""
NO_BATCHNORM = """
class GroupNorm(torch.nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(4, channels)
torch.nn.BatchNorm2d = GroupNorm
"""


def run(tmp_path, script, *flags, world=1, before="", after="", out="out"):
    """Run a script in `world` processes; returns the finished process. Exit codes of torchrun: 0, or 1."""
    argv = [str(flag) for flag in (*flags, "--device", "cpu", "--out", tmp_path / out)]
    code = tmp_path / "run.py"
    code.write_text(RUN.format(root=str(ROOT), script=script, argv=argv, before=before, after=after))
    command = [sys.executable, str(code)]
    if world > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def listed(photos):
    return ("--dataset", "imagenet-lt", "--data-root", photos, *FLAGS, "--backbone", "small", "--batch-size", "16")


def test_two_processes_equal_one_but_for_batchnorm(photos, tmp_path):
    """With GroupNorm in place of BatchNorm, whose statistics are per process: the weights agree to rounding."""
    weights = []
    for world in (1, 2):
        done = run(tmp_path, "lort", *listed(photos), "--epochs", "1", "--lr", "0.01", "--epochs2", "1", world=world,
                   before=NO_BATCHNORM, out=f"world{world}")
        assert done.returncode == 0, done.stderr
        weights.append(saved(tmp_path / f"world{world}")["net"])
        assert done.stdout.count("many / medium / few") == 1  # the first rank alone prints
    assert max((a - b).abs().max().item() for a, b in zip(weights[0].values(), weights[1].values())) < 1e-4
    one, two = (saved(tmp_path / f"world{world}", "test_logits.pt") for world in (1, 2))
    assert torch.equal(one["labels"], two["labels"]) and torch.allclose(one["logits"], two["logits"], atol=1e-3)


def test_a_killed_run_of_two_processes_goes_on_bit_for_bit(photos, tmp_path):
    """BatchNorm included. All processes end without a word in the third epoch, after the save of the second."""
    stop = """
common.SAVE_EVERY = 0.0
real = common.Run.log
def log(run, losses, **extra):
    if run.epoch == 2:
        os._exit(9)
    real(run, losses, **extra)
common.Run.log = log
"""
    flags = (*listed(photos), "--epochs", "4", "--variant", "ce-etf", "--width", "16", "--lr", "0.05")
    assert run(tmp_path, "hinge_ce", *flags, world=2, out="whole").returncode == 0
    assert run(tmp_path, "hinge_ce", *flags, world=2, after=stop, out="killed").returncode != 0
    assert not results(tmp_path / "killed") and len(list(tmp_path.glob("killed/*/train.ckpt"))) == 1
    done = run(tmp_path, "hinge_ce", *flags, world=2, out="killed")
    assert done.returncode == 0 and "resumed after epoch" in done.stdout, done.stderr
    a, b = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert a["rows"] == b["rows"] and same(saved(tmp_path / "whole")["net"], saved(tmp_path / "killed")["net"])
    assert a["device"].startswith("2 x ")


def test_the_ranks_share_the_running_statistics_alone(monkeypatch):
    """RBL's fixed matrix is not contiguous, which NCCL refuses, and equal on all ranks as it is."""
    net, shared = common.BACKBONES["small"](20), []
    net.fc = rbl.RotatedHead(64, 32, 20, torch.Generator())
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, source: shared.append(buffer))
    common.same_statistics(net)
    assert len(shared) == 3 * 7 and all(buffer.is_contiguous() for buffer in shared)


def test_a_batch_that_cannot_be_shared_is_refused(refused, monkeypatch):
    monkeypatch.setattr(common, "WORLD", 2)
    refused("hinge_ce", "--batch-size", "15", words=["--batch-size 15", "2 processes"])


@pytest.mark.parametrize("script", ["rbl", "ewb_fdr", "lwr"])
def test_every_script_trains_on_photographs(call, photos, tmp_path, script):
    extra = {"rbl": ("--dim", "16", "--augment", "crop"), "ewb_fdr": ("--variant", "wb", "--epochs2", "1"), "lwr": ()}[script]
    assert call(script, *listed(photos), "--epochs", "1", *extra) == 0
    run = result(tmp_path / "runs")
    assert run["metrics"]["val"]["all"] is not None and run["imb_factor"] == "natural"
    net, weights = common.load_network(next(tmp_path.glob("runs/*/weights.pt")))
    files = [photos / line.split()[0] for line in (photos / "ImageNet_LT_test.txt").read_text().splitlines()]
    kept = saved(tmp_path / "runs", "test_logits.pt")["logits"].softmax(1)
    assert torch.allclose(common.classify(net, weights, files), kept, atol=1e-4)
    assert all(row["paper"] is None for row in run["rows"])


def test_memory_does_not_grow_with_the_set(tmp_path):
    """3,000 images of 256 pixels are 0.6 GB: reading them all in batches keeps less than 0.2 GB resident."""
    n, side = 3000, 256
    with open(tmp_path / "x.pixels", "wb") as file:
        file.truncate(n * side * side * 3)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import resource, torch, common
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = common.ImageFile({str(tmp_path / "x.pixels")!r}, {n}, {side})
for index in torch.randperm({n}).split(128):
    images.read(index)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 2e5, done.stderr  # kB
