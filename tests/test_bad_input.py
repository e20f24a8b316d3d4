"""Bad input: one line that says what is wrong, exit code 2, no traceback, before any training."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

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
    ("--seed", "99999999999999999999"), ("--val-per-class", "-1"), ("--eval-every", "-1"), ("--image-size", "15"), ("--lr", "1e300"), ("--batch-size", "99999999999"),
    ("--backbone", "vgg"), ("--precision", "fp8"), ("--no-such-flag", "1"), ("--epoch", "1")])
def test_flags_of_every_script(refused, script, flags):
    refused(script, *flags, words=[flags[0]])


@pytest.mark.parametrize("script, flags", [
    ("lort", ("--delta", "1")), ("lort", ("--delta", "-0.1")), ("lort", ("--delta", "nan")), ("lort", ("--epochs2", "0")),
    ("lort", ("--lr2", "0")), ("lort", ("--weight-decay2", "-1")), ("lort", ("--bn", "on")),
    ("lwr", ("--theta", "1.01")), ("lwr", ("--theta", "-2")), ("lwr", ("--theta", "nan")), ("lwr", ("--strength", "-1")),
    ("lwr", ("--gamma", "-1")), ("lwr", ("--base", "ce")), ("lwr", ("--tau", "-1")),
    ("hinge_ce", ("--tau-plus", "40")), ("hinge_ce", ("--tau-plus", "-0.1")), ("hinge_ce", ("--tau-major", "2")),
    ("hinge_ce", ("--width", "0")), ("hinge_ce", ("--width", "19")), ("hinge_ce", ("--minor", "-1")), ("hinge_ce", ("--warmup", "-1")), ("hinge_ce", ("--momentum", "1")),
    ("rbl", ("--dim", "19")), ("rbl", ("--dim", "0")), ("rbl", ("--tau", "nan")), ("rbl", ("--head", "none")),
    ("ewb_fdr", ("--beta", "1")), ("ewb_fdr", ("--zeta", "-1")), ("ewb_fdr", ("--cb-loss", "mse")), ("ewb_fdr", ("--val-per-class", "0"))])
def test_flags_of_one_script(refused, script, flags):
    refused(script, *flags, words=[flags[0]])


@pytest.mark.parametrize("script, flags", [
    ("hinge_ce", "--variant ce --tau-plus 1"), ("hinge_ce", "--variant ce-etf --minor 3"), ("lwr", "--base bs --gamma 2"),
    ("lwr", "--base focal --tau 0.5"), ("ewb_fdr", "--variant ce --zeta 5"), ("ewb_fdr", "--variant wd --beta 0.9"),
    ("ewb_fdr", "--variant etf --cb-loss ce"), ("ewb_fdr", "--variant cb --epochs2 3"), ("ewb_fdr", "--variant wd --stage1 x")])
def test_a_flag_without_effect(refused, script, flags):
    key, value, flag, _ = flags.split()
    refused(script, *flags.split(), words=[f"{flag} has no effect with {key} {value}"])


@pytest.mark.parametrize("flag, value", [("theta", "0.9"), ("project", "no"), ("schedule", "const"), ("form", "lse")])
def test_a_flag_of_a_repulsion_that_is_off(refused, flag, value):
    refused("lwr", "--strength", "0", f"--{flag}", value, words=[f"--{flag} has no effect with --strength 0"])


def test_cones_without_a_class_to_put_them_on(refused):
    refused("hinge_ce", "--minor", "0", words=["no class has a cone", "ce-etf"])
    refused("hinge_ce", "--tau-plus", "0", words=["no class has a cone"])
    refused("hinge_ce", "--image-size", "32", words=["--image-size", "synthetic"])
    refused("hinge_ce", "--data-root", "x", words=["--data-root", "synthetic"])
    refused("lort", "--stage1", "x", "--lr", "0.3", words=["--lr", "--stage1"])
    refused("lort", "--stage1=", words=["--stage1", "a file"])  # a variable that is not set


def test_an_etf_needs_as_many_dimensions_as_classes(refused, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "small", lambda num_classes: Narrow(num_classes))
    refused("ewb_fdr", "--variant", "etf", words=["8 features", "--backbone"])


class Narrow(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(8, num_classes)


@pytest.mark.parametrize("factor, words", [("251", ["class 19", "--imb-factor"]), ("1e9", ["--imb-factor"])])
def test_a_class_without_images(refused, factor, words):
    refused("hinge_ce", "--imb-factor", factor, words=words)


def test_too_many_validation_images(refused):
    refused("hinge_ce", "--val-per-class", "250", words=["--val-per-class"])


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(refused, device):
    refused("hinge_ce", "--device", device, words=["--device"])


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


def test_damaged_class_names(refused, tmp_path, monkeypatch):
    import torchvision
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"x")
    md5 = __import__("hashlib").md5(b"x").hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "train_list", [["train", md5]])
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "test_list", [["test", md5]])
    refused("hinge_ce", "--dataset", "cifar100", "--data-root", tmp_path, words=["damaged"])


def test_a_damaged_cifar_file(refused, tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"half")
    refused("hinge_ce", "--dataset", "cifar100", "--data-root", tmp_path, words=[str(folder), "damaged", "synthetic"])


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


def test_damaged_results(refused, tmp_path):
    results = tmp_path / "runs" / "results.jsonl"
    results.parent.mkdir()
    line = {"method": "hinge_ce", "dataset": "synthetic", "imb_factor": 100.0, "seed": 0, "rows": [],
            "seconds": 1.0, "command": "x", "folder": "hinge_ce-hinge-synthetic-if100-seed0"}
    for content in ("{", "[]", "{}", "null", '{"flags": 3}', json.dumps(line), json.dumps(line | {"flags": 3}), b"\xff"):
        results.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused("hinge_ce", words=["results.jsonl"])
    results.write_text(json.dumps(line | {"flags": {}}))
    refused("hinge_ce", "--overwrite", "--width", "19", words=["--width"])
    assert results.read_text()  # a run that cannot start deletes nothing
    results.unlink()
    results.mkdir()
    refused("hinge_ce", words=["--out"])


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


def as_lists(own):
    for part in ("train", "test"):
        lines = [f"{path.relative_to(own)} {'abc'.index(path.parent.name) + 7}" for path in sorted((own / part).glob("*/*.png"))]
        (own.parent / "lists").mkdir(exist_ok=True)
        (own.parent / "lists" / f"My_LT_{part}.txt").write_text("\n".join(lines) + "\n")
    return own.parent / "lists"


def load(path, **changes):
    from types import SimpleNamespace
    return common.load_data(SimpleNamespace(**{"dataset": str(path), "data_root": None, "imb_factor": "natural", "subset_seed": 0,
                                               "val_per_class": 0, "image_size": None, **changes}), torch.device("cpu"))


def test_own_folders_and_lists_give_the_same_data(own):
    folders, lists = load(own), load(as_lists(own), data_root=own)
    assert folders.counts == lists.counts == [6, 3, 2]  # b, a, c: the largest first
    for part in ("train", "test"):
        a, b = getattr(folders, part), getattr(lists, part)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.images.shape[1:] == (16, 16, 3)
    first = np.asarray(Image.open(own / "test" / "b" / "0.png"))
    assert (folders.test.images[folders.test.labels == 0][0].numpy() == first).all()
    assert load(own, image_size=20).train.images.shape == (11, 20, 20, 3)
    assert folders.subset["content"] == lists.subset["content"]
    Image.new("RGB", (16, 16)).save(own / "train" / "a" / "0.png")
    assert load(own).subset["content"] != folders.subset["content"] and load(own).subset["sha256"] == folders.subset["sha256"]
    held = load(own, val_per_class=1)
    assert held.counts == [5, 2, 1] and held.val.labels.tolist() == [0, 1, 2]


def test_a_channel_may_be_constant(own):
    for path in own.glob("*/*/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * np.array([1, 1, 0], np.uint8)).save(path)
    data = load(own)
    assert common.normalise(data.train.images, data.train).isfinite().all() and data.train.std.tolist()[2] == 1


def test_a_method_runs_on_own_images(call, own, monkeypatch, tmp_path):
    monkeypatch.undo()
    flags = ("--dataset", own, "--epochs", "1", "--backbone", "small", "--batch-size", "4")
    assert call("hinge_ce", *flags) == 0 and call("hinge_ce", *flags, "--dataset", f"{own}/") == 0  # the same run
    assert call("ewb_fdr", *flags, "--val-per-class", "1") == 0
    result = json.loads((tmp_path / "runs" / "results.jsonl").read_text().splitlines()[0])
    weights = torch.load(tmp_path / "runs" / result["folder"] / "weights.pt", weights_only=True)
    logits = torch.load(tmp_path / "runs" / result["folder"] / "test_logits.pt", weights_only=True)
    assert len(weights["classes"]) == logits["logits"].shape[1] == len(logits["counts"]) and weights["mean"].shape == (3,)
    assert result["imb_factor"] == "natural" and result["acc"]["many"] is None and result["acc"]["few"] is not None


def test_twenty_thousand_small_images_are_read_in_seconds(own):
    import time
    image = (own / "train" / "a" / "0.png").read_bytes()
    for k in range(2000):
        (own / "train" / "b" / f"x{k}.png").write_bytes(image)
    began = time.time()
    assert load(own).counts[0] == 2006 and time.time() - began < 5  # a tenth of the images


def break_own(own, how):
    """Damage the folder; returns what the message must hold."""
    if how == "no test":
        shutil.rmtree(own / "test")
        return "test"
    if how == "unreadable":
        for name in "012":
            (own / "train" / "a" / f"{name}.png").write_bytes(b"no image")  # several, and still one line
        return ".png cannot be read"
    if how == "cut":
        path = own / "test" / "b" / "1.png"
        path.write_bytes(path.read_bytes()[:100])
        return "1.png"
    if how == "other size":
        Image.new("RGB", (9, 16)).save(own / "train" / "a" / "z.png")
        return "--image-size"
    redrawn = {"no squares": ("*/*/*.png", (24, 16)), "other size in test": ("test/*/*.png", (24, 24)), "tiny": ("*/*/*.png", (4, 4))}
    if how in redrawn:
        pattern, size = redrawn[how]
        for path in own.glob(pattern):
            Image.new("RGB", size).save(path)
        return "--image-size"
    if how == "empty class":
        (own / "train" / "empty").mkdir()
        (own / "train" / "empty" / ".gitkeep").write_text("")
        return "empty"
    if how == "16 bits":
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(own / "train" / "a" / "0.png")
        return "8 bits"
    if how == "nothing":
        for part in ("train", "test"):
            shutil.rmtree(own / part)
            (own / part).mkdir()
        return "class folder"
    if how == "two val lists":
        for name in ("a_val.txt", "b_val.txt"):
            (own / name).write_text("x 1")
        return "val"
    if how == "class only in test":
        (own / "train" / "c").rename(own.parent / "c")
        return "c is missing in train"
    if how == "class not in test":
        (own / "test" / "c").rename(own.parent / "c")
        return "c is missing in test"
    if how == "val without a class":
        (own / "val").mkdir()
        (own / "test" / "c").rename(own / "val" / "c")
        return "is missing in"
    if how == "folder and list":
        (own / "my_train.txt").write_text("train/a/0.png 1")
        return "train/ and my_train.txt"
    if how == "loop":
        (own / "train" / "a" / "again").symlink_to(own / "train" / "a")
        return "more than once"
    if how == "in train and test":
        (own / "test" / "a" / "z.png").symlink_to(own / "train" / "a" / "0.png")
        return "0.png is there more than once"
    if how == "one class":
        for name in "bc":
            for part in ("train", "test"):
                shutil.rmtree(own / part / name)
        return "single class"


@pytest.mark.parametrize("how", ["no test", "unreadable", "cut", "other size", "empty class", "class only in test", "class not in test",
                                 "val without a class", "one class", "16 bits", "tiny", "no squares", "other size in test", "nothing", "two val lists",
                                 "folder and list", "loop", "in train and test"])
def test_broken_own_folders(refused, own, how):
    refused("hinge_ce", "--dataset", own, words=[break_own(own, how)])


@pytest.mark.parametrize("content, words", [("a.png\n", "a.png"), ("none.png 8\n", "none.png"), ("", "no training images"), ("a b c.png\n", "c.png is missing in test"), ("\x00 8\n", "cannot be read"), ("train/a/0.png 7\n", "more than once")])
def test_broken_lists(refused, own, content, words):
    lists = as_lists(own)
    good = (lists / "My_LT_train.txt").read_text() if content else ""
    (lists / "My_LT_train.txt").write_text(good + content)
    refused("hinge_ce", "--dataset", lists, "--data-root", own, words=[words])


def test_other_broken_lists(refused, own):
    lists = as_lists(own)
    (lists / "train.txt").write_text("a 1\n")
    refused("hinge_ce", "--dataset", lists, words=["train"])  # two lists
    (lists / "train.txt").unlink()
    (lists / "My_LT_train.txt").write_bytes(b"\xff\xfe 1\n")
    refused("hinge_ce", "--dataset", lists, words=["is missing in"])


def test_imbalance_that_own_data_cannot_have(refused, own):
    refused("hinge_ce", "--dataset", own, "--imb-factor", "1.5", words=["natural"])


# ---- the table, and the command line as a user meets it

@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": 1}', "3", '{"rows": [{"acc": 5, "row": "x"}], "method": "", "dataset": "", "imb_factor": 1, "flags": []}'])
def test_table_of_something_else(tmp_path, content):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    done = subprocess.run([sys.executable, ROOT / "common.py", path], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


def test_from_the_shell():
    done = subprocess.run([sys.executable, ROOT / "methods" / "lort.py", "--delta", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: argument --delta: must be in [0, 1), not 1\n"
