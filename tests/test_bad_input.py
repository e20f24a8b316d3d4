"""Bad input: one line that says what is wrong, exit code 2, no traceback, before any training."""
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
from conftest import ROOT, SCRIPTS


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    monkeypatch.setattr(common, "batches", lambda *_: pytest.fail("training began"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [
    ("--epochs", "0"), ("--epochs", "-3"), ("--epochs", "1.5"), ("--batch-size", "0"), ("--lr", "0"), ("--lr", "-1"), ("--lr", "nan"),
    ("--lr", "inf"), ("--lr", "fast"), ("--weight-decay", "-1"), ("--weight-decay", "nan"), ("--imb-factor", "0.01"),
    ("--imb-factor", "nan"), ("--imb-factor", "inf"), ("--imb-factor", "much"), ("--subset-seed", "-1"), ("--seed", "-1"),
    ("--seed", "99999999999999999999"), ("--val-per-class", "-1"), ("--eval-every", "-1"), ("--image-size", "15"),
    ("--lr", "1e300"), ("--batch-size", "99999999999"),
    ("--backbone", "vgg"), ("--precision", "fp8"), ("--no-such-flag", "1"), ("--epoch", "1")])
def test_flags_of_every_script(refused, script, flags):
    refused(script, *flags, words=[flags[0]])


@pytest.mark.parametrize("script, flags", [
    ("lort", ("--delta", "1")), ("lort", ("--delta", "-0.1")), ("lort", ("--delta", "nan")), ("lort", ("--epochs2", "0")),
    ("lort", ("--lr2", "0")), ("lort", ("--weight-decay2", "-1")), ("lort", ("--bn", "on")),
    ("lwr", ("--theta", "1.01")), ("lwr", ("--theta", "-2")), ("lwr", ("--theta", "nan")), ("lwr", ("--strength", "-1")),
    ("lwr", ("--gamma", "-1")), ("lwr", ("--base", "ce")), ("lwr", ("--tau", "-1")),
    ("hinge_ce", ("--tau-plus", "40")), ("hinge_ce", ("--tau-plus", "-0.1")), ("hinge_ce", ("--tau-major", "2")),
    ("hinge_ce", ("--width", "0")), ("hinge_ce", ("--width", "19")), ("hinge_ce", ("--minor", "-1")), ("hinge_ce", ("--warmup", "-1")),
    ("rbl", ("--dim", "19")), ("rbl", ("--dim", "0")), ("rbl", ("--tau", "nan")), ("rbl", ("--head", "none")),
    ("ewb_fdr", ("--beta", "1")), ("ewb_fdr", ("--zeta", "-1")), ("ewb_fdr", ("--cb-loss", "mse")), ("ewb_fdr", ("--val-per-class", "0"))])
def test_flags_of_one_script(refused, script, flags):
    refused(script, *flags, words=[flags[0]])


def test_flags_without_effect_where_they_would_falsify_an_ablation(refused):
    refused("ewb_fdr", "--variant", "etf", "--cb-loss", "ce", words=["--cb-loss", "--variant etf"])
    refused("ewb_fdr", "--variant", "wd", "--stage1", "x", words=["--stage1", "--variant wd"])
    refused("ewb_fdr", "--variant", "wd", "--zeta", "1", words=["--zeta", "--variant wd"])
    refused("ewb_fdr", "--beta", "0.5", words=["--beta", "--variant fr-etf"])
    refused("hinge_ce", "--variant", "ce", "--tau-plus", "1", words=["--tau-plus", "--variant ce"])
    refused("lwr", "--strength", "0", "--theta", "0", words=["--theta", "--strength 0"])
    refused("lwr", "--tau", "2", words=["--tau", "--base bs"])
    refused("lort", "--stage1", "x", "--init", "he", words=["--init", "--stage1"])
    refused("lort", "--retrain", "all", "--bn", "eval", words=["--bn", "--retrain"])
    refused("ewb_fdr", "--dataset", "inat18", words=["8,142", "--variant"])
    for stage1 in ("", "nowhere.pt", "."):
        refused("lort", "--dataset", "synthetic", "--stage1", stage1, words=[f"--stage1 '{stage1}' is no file"])
    refused("hinge_ce", "--dataset", "imagenet-lt", "--cache-size", "128", words=["--cache-size 128", "--image-size 224"])
    refused("hinge_ce", "--dataset", "imagenet-lt", "--pad", "4", words=["--pad", "photographs"])
    refused("hinge_ce", "--minor", "0", words=["no class has a cone", "ce-etf"])
    refused("hinge_ce", "--tau-plus", "0", words=["no class has a cone"])


def test_an_etf_needs_as_many_dimensions_as_classes(refused, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "small", lambda num_classes: Narrow(num_classes))
    refused("ewb_fdr", "--variant", "etf", words=["not 8", "--backbone"])


class Narrow(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(8, num_classes)


@pytest.mark.parametrize("factor, words", [("126", ["class 19", "--imb-factor"]), ("1e9", ["--imb-factor"])])
def test_a_class_without_images(refused, factor, words):
    refused("hinge_ce", "--imb-factor", factor, words=words)


def test_too_many_validation_images(refused):
    refused("hinge_ce", "--val-per-class", "250", words=["--val-per-class"])


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(refused, device):
    refused("hinge_ce", "--device", device, words=["--device"])


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = ("auto", "cuda", "cuda:0", "cuda:1", "cpu")
    assert [str(common.choose_device(name)) for name in names] == ["cuda:0", "cuda:0", "cuda:0", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun: each process has a GPU of its own
    assert str(common.choose_device("auto")) == str(common.choose_device("cuda")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        common.choose_device("auto")


def test_precision_on_a_cpu(refused):
    refused("hinge_ce", "--precision", "tf32", words=["GPU"])


def test_an_output_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("hinge_ce", out=tmp_path / "file", words=["--out"])
    refused("hinge_ce", out=tmp_path / "file" / "below", words=["--out"])
    refused("hinge_ce", out=tmp_path / ("x" * 300), words=["--out"])


def test_no_such_data(refused, monkeypatch, tmp_path):
    import torchvision
    refused("hinge_ce", "--dataset", "cifar1000", words=["cifar1000", "synthetic"])
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/none")
    refused("hinge_ce", "--dataset", "cifar100", "--data-root", tmp_path / "none", words=["cifar-100-python", "train", "synthetic"])
    (tmp_path / "file").write_text("")
    refused("hinge_ce", "--dataset", "cifar100", "--data-root", tmp_path / "file", words=["cifar-100-python"])
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"half")
    refused("hinge_ce", "--dataset", "cifar100", "--data-root", tmp_path, words=["cifar-100-python", "damaged: train", "synthetic"])


def test_damaged_class_names(refused, tmp_path, monkeypatch):
    import torchvision
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"x")
    md5 = __import__("hashlib").md5(b"x").hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "train_list", [["train", md5]])
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "test_list", [["test", md5]])
    refused("hinge_ce", "--dataset", "cifar100", "--data-root", tmp_path, words=["damaged: meta;"])


@pytest.mark.parametrize("content", ["missing", "text", "empty", "folder", "tensor", "other network", "module", "number", "odd flags"])
def test_stage_one_files(refused, tmp_path, content):
    path = tmp_path / "stage1.pt"
    if content == "text":
        path.write_text("hello")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "folder":
        path.mkdir()
    elif content != "missing":
        torch.save({"tensor": torch.zeros(3), "other network": {"net": common.BACKBONES["resnet32"](20).state_dict()},
                    "module": torch.nn.Linear(2, 2), "number": {"net": 3}, "odd flags": {"net": {}, "flags": 3}}[content], path)
    refused("lort", "--stage1", path, words=[str(path)])
    refused("ewb_fdr", "--variant", "wb", "--stage1", path, words=[str(path)])


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", '{"flags": 3}', "", b"\xff"])
def test_a_damaged_result(refused, tmp_path, content):
    folder = tmp_path / "runs" / "hinge_ce-hinge-synthetic-if100-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("hinge_ce", words=["result.json"])


# ---- your own images

@pytest.fixture
def own(tmp_path):
    """Folders train/ and test/ with classes a (3 images), b (6), c (2), 16 x 16 pixels, each of one grey level."""
    rng = np.random.RandomState(0)
    for part, counts in {"train": {"a": 3, "b": 6, "c": 2}, "test": {"a": 2, "b": 2, "c": 2}}.items():
        for k, (name, n) in enumerate(counts.items()):
            (tmp_path / "own" / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "own" / part / name / f"{i}.png")
    return tmp_path / "own"


def as_lists(own, pattern="*.png"):
    for part in ("train", "test"):
        files = sorted((own / part).glob(f"*/{pattern}"))
        lines = [f"{path.relative_to(own)} {'abc'.index(path.parent.name) + 7}" for path in files]
        (own.parent / "lists").mkdir(exist_ok=True)
        (own.parent / "lists" / f"My_LT_{part}.txt").write_text("\n".join(lines) + "\n")
    return own.parent / "lists"


def load(path, **changes):
    args = common.base_parser("").parse_args(["--dataset", str(path)])
    return common.load_data(SimpleNamespace(**vars(args) | {"imb_factor": "natural"} | changes), torch.device("cpu"))


def test_own_folders_and_lists_give_the_same_data(own):
    folders, lists = load(own), load(as_lists(own), data_root=own)
    assert folders.counts == lists.counts == [6, 3, 2]  # b, a, c: the largest first
    assert folders.classes == ["b", "a", "c"] and lists.classes == ["8", "7", "9"]
    for part in ("train", "test"):
        a, b = getattr(folders, part), getattr(lists, part)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.images.shape[1:] == (16, 16, 3)
    first = np.asarray(Image.open(own / "test" / "b" / "0.png"))
    assert (folders.test.images[folders.test.labels == 0][0].numpy() == first).all()
    photographs = load(own, image_size=20)
    assert photographs.train.images.shape == (11, 256, 256, 3) and photographs.train.crop == 20
    assert photographs.test.images.shape == (6, 20, 20, 3)
    assert folders.subset["content"] == lists.subset["content"]
    Image.new("RGB", (16, 16)).save(own / "train" / "a" / "0.png")
    assert load(own).subset["content"] != folders.subset["content"]
    assert load(own).subset["sha256"] == folders.subset["sha256"]
    held = load(own, val_per_class=1)
    assert held.counts == [5, 2, 1] and held.val.labels.tolist() == [0, 1, 2]


def test_what_is_no_image_is_named_and_what_is_hidden_is_no_data(own, capsys):
    plain = load(own)
    for name in ("notes.txt", "Thumbs.db"):
        (own / "train" / "a" / name).write_text("x")
    for hidden in (own / "train" / ".ipynb_checkpoints", own / "train" / "a" / ".ipynb_checkpoints", own / ".git" / "train"):
        hidden.mkdir(parents=True)
        shutil.copy(own / "train" / "a" / "0.png", hidden / "0-checkpoint.png")
    shutil.copy(own / "train" / "a" / "0.png", own / "train" / "a" / "._0.png")
    capsys.readouterr()
    data = load(own)
    assert data.counts == plain.counts and data.subset == plain.subset
    assert "left out: 2 files" in capsys.readouterr().out


def test_linked_folders_are_read(own, tmp_path):
    plain = load(own)
    for part in ("train", "test"):
        (own / part / "c").rename(tmp_path / f"c {part}")
        (own / part / "c").symlink_to(tmp_path / f"c {part}")
    assert load(own).counts == plain.counts


def test_a_finished_run_of_other_pictures_is_refused(call, refused, own, monkeypatch):
    monkeypatch.undo()
    flags = ("--dataset", own, "--backbone", "small", "--batch-size", "4", "--epochs", "1")
    assert call("lwr", *flags) == 0 and call("lwr", *flags) == 0
    shutil.rmtree(own / "train" / "c")
    shutil.rmtree(own / "test" / "c")
    refused("lwr", *flags, words=["result.json", "the data have changed"])


def test_pictures_that_changed_are_read_again(own):
    for grey in (10, 20):  # files of one length
        Image.new("RGB", (16, 16), (grey, 0, 0)).save(own / "train" / "b" / "0.bmp")
        assert (load(own).train.images[..., 0] == grey).all((1, 2)).any()


def test_folders_and_lists_read_the_same_types(own):
    for k in range(8):
        Image.fromarray(np.random.RandomState(k + 1).randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(own / "train" / "c" / f"{k}x.gif")
    lists = as_lists(own, "*.*")
    assert load(own).counts == load(lists, data_root=own).counts == [10, 6, 3]


@pytest.mark.parametrize("names", [("Train", "TEST", "validation"), ("train", "test", "valid")])
def test_other_names_of_the_parts(own, names):
    plain = load(own)
    for old, new in zip(("train", "test"), names):
        (own / old).rename(own / new)
    shutil.copytree(own / names[1], own / names[2])
    for k, path in enumerate(sorted((own / names[2]).glob("*/*.png"))):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(path)
    data = load(own)
    assert data.counts == plain.counts and len(data.val.labels) == 6


def test_a_class_may_be_missing_in_val(call, own, monkeypatch, tmp_path):
    monkeypatch.undo()
    (own / "val" / "b").mkdir(parents=True)
    (own / "val" / "a").mkdir()
    Image.new("RGB", (16, 16), (9, 0, 0)).save(own / "val" / "b" / "0.png")
    Image.new("RGB", (16, 16), (7, 0, 0)).save(own / "val" / "a" / "0.png")
    for script in ("hinge_ce", "ewb_fdr"):
        assert call(script, "--dataset", own, "--epochs", "1", "--backbone", "small", "--batch-size", "4") == 0


def test_a_path_is_a_folder_even_if_it_is_named_like_a_set(own, monkeypatch):
    own.rename(own.parent / "cifar10")
    monkeypatch.chdir(own.parent)
    assert load("./cifar10").counts == [6, 3, 2]
    args = common.base_parser("").parse_args(["--dataset", "cifar10/"])
    assert args.dataset == "./cifar10" and common.base_parser("").parse_args(["--dataset", "cifar10"]).dataset == "cifar10"
    assert common.base_parser("").parse_args(["--dataset", "x/"]).dataset == "x"


def test_a_damaged_exif_block_is_no_reason_to_refuse_an_image(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg", dpi=(72, 72), exif=b"Exif\0\0no such block")
    with pytest.raises(SyntaxError):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert common.open_image(tmp_path / "a.jpg").getpixel((0, 0)) == (254, 0, 0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / "b.jpg", exif=turned)
    sizes = [common.open_image(tmp_path / "b.jpg", own).size for own in (True, False)]
    assert sizes == [(48, 64), (64, 48)]  # no loader of the large sets turns images
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        common.open_image(tmp_path / "b.jpg")


def test_a_channel_may_be_constant(own):
    for path in own.glob("*/*/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * np.array([1, 1, 0], np.uint8)).save(path)
    data = load(own)
    assert common.normalise(data.train.images, data.train).isfinite().all() and data.train.std.tolist()[2] == 1


def test_a_method_runs_on_own_images(call, own, monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    flags = ("--dataset", own, "--epochs", "1", "--backbone", "small", "--batch-size", "4")
    assert call("hinge_ce", *flags) == 0 and call("hinge_ce", *flags, "--dataset", f"{own}/") == 0  # the same run
    assert call("ewb_fdr", *flags, "--val-per-class", "1") == 0
    folder, = tmp_path.glob("runs/hinge_ce-*")
    run, weights = json.loads((folder / "result.json").read_text()), common.load(folder / "weights.pt")
    assert weights["classes"] == ["b", "a", "c"] and weights["mean"].shape == (3,)
    assert run["imb_factor"] == "natural" and run["rows"][0]["acc"]["many"] is None and run["rows"][0]["acc"]["few"] is not None
    capsys.readouterr()
    common.print_classes(folder)
    assert "| b | 6 |" in capsys.readouterr().out
    net, saved = common.load_network(folder / "weights.pt")
    kept = common.load(folder / "test_logits.pt")
    at = [str(path) for path in sorted((own / "test" / "b").glob("*.png"))]
    probabilities = kept["logits"].softmax(1)[kept["labels"] == 0]
    assert torch.allclose(common.classify(net, saved, at), probabilities, atol=1e-5)
    monkeypatch.setattr(sys, "argv", ["common.py", "predict", str(folder), "hinge", *at])
    common.main()
    for path, line, p in zip(at, capsys.readouterr().out.splitlines(), probabilities, strict=True):
        found, name = re.fullmatch(r"(\S+): (\w) ([\d.]+) %(?:, \w [\d.]+ %){2}", line), "bac"[p.argmax()]
        assert found.group(1, 2) == (path, name) and float(found.group(3)) == pytest.approx(100 * p.max().item(), abs=0.1)
    moved = shutil.move(own, tmp_path / "elsewhere" / "own")  # the same images: the same run, and the same stage 1
    assert call("hinge_ce", *flags, "--dataset", moved) == 0 and "is finished" in capsys.readouterr().out
    assert call("lort", *flags, "--dataset", moved, "--stage1", folder / "weights.pt", "--epochs2", "1") == 0


def test_table_1_of_own_images(call, refused, own, monkeypatch, tmp_path):
    """Chosen on held out images, or on a folder val/; not without either."""
    monkeypatch.undo()
    flags = ("--dataset", own, "--backbone", "small", "--batch-size", "4")
    for out, held_out in {"held out": ("--val-per-class", "1"), "val": ()}.items():
        if out == "val":
            shutil.copytree(own / "test", own / "val")
            for picture in own.glob("val/*/*.png"):
                Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
        assert call("hinge_ce", *flags, *held_out, "--epochs", "1", out=tmp_path / out) == 0
        stage1, = (tmp_path / out).glob("hinge_ce-*/weights.pt")
        refused("lort", *flags, "--stage1", stage1, "--image-size", "32", out=tmp_path / "x", words=["--image-size None, not 32"])
        if out == "held out":
            refused("lort", *flags, "--retrain", "all", "--stage1", stage1, words=["--val-per-class", "val"])
        assert call("lort", *flags, *held_out, "--retrain", "all", "--stage1", stage1, "--epochs2", "2", out=tmp_path / out) == 0
        run = json.loads(next((tmp_path / out).glob("lort-*/result.json")).read_text())
        assert len(run["rows"]) == 12 and run["flags"]["val_per_class"] == len(held_out) // 2
        assert all(row["paper"] is None and row["acc"]["all"] is not None for row in run["rows"])


def test_overall_accuracy_where_the_test_set_is_not_balanced(call, own, monkeypatch, tmp_path):
    monkeypatch.undo()
    (own / "test" / "b" / "1.png").unlink()
    flags = ("--dataset", own, "--epochs", "1", "--backbone", "small", "--batch-size", "4")
    assert call("hinge_ce", *flags) == 0
    run = json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())
    kept = common.load(next(tmp_path.glob("runs/*/test_logits.pt")))
    hits = (kept["logits"].argmax(1) == kept["labels"]).double().mean().item()
    assert run["metrics"]["overall accuracy"] == pytest.approx(100 * hits)


def test_thousands_of_small_images_are_read_in_seconds(own):
    began = time.time()
    for k in range(2000):
        Image.fromarray(np.random.RandomState(k + 1).randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(own / "train" / "b" / f"x{k}.png")
    written = time.time() - began
    assert load(own).counts[0] == 2006 and time.time() - began < 5 + 2 * written


def break_own(own, how):
    """Damage the folder; returns what the message must hold."""
    if how == "no test":
        shutil.rmtree(own / "test")
        return "test"
    if how == "unreadable":
        for name in "012":
            (own / "train" / "a" / f"{name}.png").write_bytes(b"no image")
        return "(3 of 11 images"  # and still one line
    if how == "dead link":
        (own / "train" / "b" / "0.png").unlink()
        (own / "train" / "b" / "0.png").symlink_to(own / "gone.png")
        return "0.png: cannot be read"
    if how == "cut":
        path = own / "test" / "b" / "1.png"
        path.write_bytes(path.read_bytes()[:100])
        return "1.png"
    if how == "other size":
        Image.new("RGB", (9, 16)).save(own / "train" / "a" / "z.png")
        return "z.png: 9 x 16 pixels"
    redrawn = {"no squares": ("*/*/*.png", (24, 16)), "other size in test": ("test/*/*.png", (24, 24)),
               "tiny": ("*/*/*.png", (4, 4)), "photographs": ("*/*/*.png", (2000, 2000))}
    if how in redrawn:
        pattern, size = redrawn[how]
        for path in own.glob(pattern):
            Image.new("RGB", size).save(path)
        return "--image-size"
    if how == "16 bits":
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(own / "train" / "a" / "0.png")
        return "8 bits"
    if how == "nothing":
        for part in ("train", "test"):
            shutil.rmtree(own / part)
            (own / part).mkdir()
        return "two classes"
    if how == "two val lists":
        for name in ("a_val.txt", "b_val.txt"):
            (own / name).write_text("x 1")
        return "*val.txt"
    if how == "two trains":
        shutil.copytree(own / "train", own / "TRAIN")
        return "not 2 and 0"
    if how == "class only in test":
        (own / "train" / "c").rename(own.parent / "c")
        return "class c has no train images"
    if how == "class not in test":
        (own / "test" / "c").rename(own.parent / "c")
        return "class c has no test images"
    if how == "no image in a class":
        (own / "train" / "d").mkdir()
        (own / "train" / "d" / "1.heic").write_text("x")
        return "only such as 1.heic"
    if how == "folder and list":
        (own / "my_train.txt").write_text("train/a/0.png 1")
        return "not 1 and 1"
    if how == "in train and test":
        (own / "test" / "a" / "z.png").symlink_to(own / "train" / "a" / "0.png")
        return "the same picture: "
    if how == "copied to another class":
        shutil.copy(own / "train" / "a" / "0.png", own / "train" / "b" / "z.png")
        return "in train (1 in all)"
    if how == "one class":
        for name in "bc":
            for part in ("train", "test"):
                shutil.rmtree(own / part / name)
        return "two classes"


@pytest.mark.parametrize("how", [
    "no test", "unreadable", "dead link", "cut", "other size", "class only in test", "class not in test", "one class", "16 bits", "tiny",
    "no squares", "other size in test", "photographs", "nothing", "two val lists", "two trains", "folder and list",
    "in train and test", "copied to another class", "no image in a class"])
def test_broken_own_folders(refused, own, how):
    refused("hinge_ce", "--dataset", own, words=[break_own(own, how)])


def test_a_photograph_in_train_and_test_is_refused(refused, own):
    """Though one is kept whole and the other cropped."""
    shutil.copy(own / "train" / "a" / "0.png", own / "test" / "b" / "z.png")
    refused("hinge_ce", "--dataset", own, "--image-size", "16", "--cache-size", "16", words=["the same picture: "])


def test_what_cannot_be_read_leaves_nothing_behind(refused, own):
    break_own(own, "cut")
    refused("hinge_ce", "--dataset", own)
    assert len(list(own.glob(".cache/*.pixels"))) == 1  # of the training images, which all are read


def test_a_disk_too_small_for_the_images_is_not_left_full(refused, own, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused("hinge_ce", "--dataset", own, words=[".cache", "GB", "No space left"])
    assert not list(own.glob(".cache/*.pixels"))


def test_a_damaged_image_is_named_though_it_is_the_first(refused, own):
    (own / "train" / "b" / "0.png").write_text("x")  # of the largest class
    refused("hinge_ce", "--dataset", own, words=["b/0.png: cannot be read"])


def test_photographs_are_refused_before_all_are_read(refused, own, monkeypatch):
    break_own(own, "photographs")
    real, read = common.open_image, []
    monkeypatch.setattr(common, "open_image", lambda path: read.append(path) or real(path))
    refused("hinge_ce", "--dataset", own, words=["2000 pixels", "--image-size"])
    assert len(read) == 1


def test_a_full_memory_does_not_blame_an_image(refused, own, monkeypatch):
    def convert(*_):
        raise MemoryError
    monkeypatch.setattr(Image.Image, "convert", convert)
    refused("hinge_ce", "--dataset", own, words=["out of memory"])


def test_a_picture_twice_in_its_class_is_accepted(own):
    shutil.copy(own / "train" / "a" / "0.png", own / "train" / "a" / "z.png")
    assert load(own).counts == [6, 4, 2]


@pytest.mark.parametrize("content, words", [
    ("a.png\n", "a.png"), ("none.png 8\n", "none.png"), ("", "two classes"), ("a b c.png\n", "class c.png has no test images"),
    ("\x00 8\n", "cannot be read"), ("train/a/0.png 9\n", "same picture"), ("elsewhere/0.png 8\n", "--data-root")])
def test_broken_lists(refused, own, content, words):
    lists = as_lists(own)
    good = (lists / "My_LT_train.txt").read_text() if content else ""
    (lists / "My_LT_train.txt").write_text(good + content)
    refused("hinge_ce", "--dataset", lists, "--data-root", own, words=[words])


def test_other_broken_lists(refused, own):
    lists = as_lists(own)
    (lists / "train.txt").write_text("a 1\n")
    refused("hinge_ce", "--dataset", lists, words=["not 0 and 2"])
    (lists / "train.txt").unlink()
    (lists / "My_LT_train.txt").write_bytes(b"\xff\xfe 1\n")
    refused("hinge_ce", "--dataset", lists, words=["two classes"])


def test_imbalance_that_own_data_cannot_have(refused, own):
    refused("hinge_ce", "--dataset", own, "--imb-factor", "1.5", words=["natural"])


# ---- results, and the command line as a user meets it

@pytest.fixture
def command_line(monkeypatch, capsys):
    """python common.py WORDS, here: exit code and what stands on stderr."""
    def command_line(*words):
        monkeypatch.setattr(sys, "argv", ["common.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            common.guard(common.main)
        return stop.value.code, capsys.readouterr().err.strip()
    return command_line


WRONG = '{"rows": [{"acc": 5, "row": "x"}], "method": "", "dataset": "", "imb_factor": 1, "flags": []}'


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"rows": 1}', "3", WRONG])
def test_table_of_something_else(command_line, tmp_path, content):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    for words in ([path], [tmp_path], [tmp_path / "none"]):
        code, error = command_line(*words)
        assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error: ")


@pytest.mark.parametrize("words", [[], ["predict"], ["predict", "x"], ["classes"], ["predict", "none", "x.png"],
                                   ["classes", "none"], ["a", "b"], [""]])
def test_common_on_the_command_line(command_line, words):
    code, error = command_line(*words)
    assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error: ")


def test_from_the_shell():
    done = subprocess.run([sys.executable, ROOT / "methods" / "lort.py", "--delta", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: argument --delta: must be in [0, 1), not 1\n"
