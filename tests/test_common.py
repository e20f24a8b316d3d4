"""common.py against slow references: the subset, the batches, the networks, the scores, the table."""
import hashlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import common

CIFAR = Path(os.environ.get("CIFAR_ROOT", Path(__file__).parents[1] / "data"))
CPU = torch.device("cpu")


def arguments(**changes):
    return SimpleNamespace(**{"dataset": "synthetic", "data_root": None, "imb_factor": 100.0, "subset_seed": 0,
                              "val_per_class": 0, "image_size": None, **changes})


def rows(images):
    return {bytes(image) for image in images.flatten(1).numpy()}


# ---- the subset

def test_counts_of_the_papers():
    assert common.exp_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert common.exp_counts(5000, 10, 200) == [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]
    totals = {10: 19573, 50: 12608, 100: 10847, 200: 9502}
    assert {f: sum(common.exp_counts(500, 100, f)) for f in totals} == totals
    groups = common.shot_groups(common.exp_counts(500, 100, 100))
    assert [int(groups[name].sum()) for name in ("all", "many", "medium", "few")] == [100, 35, 35, 30]
    assert common.exp_counts(7, 1, 100) == [7] and common.exp_counts(7, 3, 1) == [7, 7, 7]


def test_the_subset_is_the_one_of_the_global_generator_and_leaves_that_alone():
    labels, counts = np.random.RandomState(1).randint(0, 5, 200), [20, 9, 4, 2, 1]
    np.random.seed(0)
    slow = []
    for c, n in enumerate(counts):
        index = np.where(labels == c)[0]
        np.random.shuffle(index)
        slow.extend(index[:n])
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    assert common.long_tail_indices(labels, counts).tolist() == slow
    assert common.long_tail_indices(labels.tolist(), counts).dtype == np.int64
    assert (np.random.get_state()[1] == before).all()
    assert common.long_tail_indices(labels, counts, seed=1).tolist() != slow
    with pytest.raises(ValueError, match="class 4"):
        common.long_tail_indices(labels, [1, 1, 1, 1, 200])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_fingerprints_on_the_real_data(name):
    if not (CIFAR / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]).is_dir():
        pytest.skip(f"no CIFAR files in {CIFAR} (CIFAR_ROOT names another folder)")
    (_, labels), _ = common.cifar(name, CIFAR)
    for factor, fingerprint in common.FINGERPRINTS[name].items():
        counts = common.exp_counts(np.bincount(labels)[0], labels.max() + 1, factor)
        indices = common.long_tail_indices(labels, counts)
        assert hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16] == fingerprint
    data = common.load_data(arguments(dataset=name, data_root=CIFAR, val_per_class=20), CPU)
    assert data.subset["sha256"] == common.FINGERPRINTS[name][100]
    assert not rows(data.train.images) & (rows(data.val.images) - rows(data.test.images))


def test_a_wrong_subset_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(common, "FINGERPRINTS", {"synthetic": {100.0: "0" * 16}})
    with pytest.raises(SystemExit):
        common.load_data(arguments(), CPU)
    assert "not the field's" in capsys.readouterr().err
    common.load_data(arguments(subset_seed=1), CPU)


def test_synthetic_set_and_its_validation_images():
    plain = common.load_data(arguments(), CPU)
    groups = common.shot_groups(plain.counts)
    assert all(group.any() for group in groups.values()) and plain.counts[-1] in (2, 3) and plain.counts[0] / plain.counts[-1] >= 100
    assert plain.val is None and torch.bincount(plain.test.labels).unique().tolist() == [50]
    held = common.load_data(arguments(val_per_class=10), CPU)
    assert held.subset["sha256"] == plain.subset["sha256"]
    assert torch.bincount(held.val.labels).tolist() == [10] * 20
    assert held.counts == [240] + plain.counts[1:]  # only the full head class gives images up
    assert torch.bincount(held.train.labels).tolist() == held.counts
    train, val, test = rows(held.train.images), rows(held.val.images), rows(held.test.images)
    assert len(train) == sum(held.counts) and not train & val and not train & test and not val & test
    natural = common.load_data(arguments(imb_factor="natural"), CPU)
    assert natural.counts == [250] * 20


# ---- batches

def test_crop_and_flip_equal_the_slow_version():
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    fast = common.crop_flip(images, torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    top, left = torch.randint(0, 9, (2, 40), generator=draws)
    mirror = torch.rand(40, 1, 1, 1, generator=draws).flatten() < 0.5
    for k in range(40):
        image = ImageOps.expand(Image.fromarray(images[k].numpy()), 4, 0)
        image = image.crop((int(left[k]), int(top[k]), int(left[k]) + 32, int(top[k]) + 32))
        image = ImageOps.mirror(image) if mirror[k] else image
        assert (np.asarray(image) == fast[k].numpy()).all()


def test_crop_offsets_are_uniform_and_half_are_mirrored():
    position = torch.arange(32 * 32).view(32, 32)
    image = torch.stack([position // 32 + 1, position % 32 + 1, torch.zeros_like(position)], 2).to(torch.uint8)
    out = common.crop_flip(image.expand(20000, 32, 32, 3), torch.Generator().manual_seed(0))
    down = out[:, 16, 16, 0].long() - 13  # which row lies at row 16: 16 - 4 + top + 1
    assert torch.bincount(down, minlength=9).min() > 2000 and down.max() == 8 and down.min() == 0
    mirrored = out[:, 16, 10, 1] > out[:, 16, 20, 1]
    assert 0.48 < mirrored.double().mean() < 0.52


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 1000])
def test_an_epoch_holds_every_image_once(batch_size):
    n = 100
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 4, 4, 3)
    split = common.Split(images, torch.arange(n) % 10, torch.zeros(3), torch.ones(3))
    generator, orders = torch.Generator().manual_seed(0), []
    for _ in range(2):
        batches = list(common.batches(split, batch_size, generator, lambda images, generator: images))
        assert [len(x) for x, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
        x, labels = (torch.cat(parts) for parts in zip(*batches))
        order = x[:, 0, 0, 0].long()
        assert order.sort().values.tolist() == list(range(n)) and (labels == order % 10).all()
        orders.append(order.tolist())
    assert orders[0] != orders[1]


def test_batches_in_several_parts_are_whole_and_normalised(monkeypatch):
    data = common.load_data(arguments(), CPU)
    monkeypatch.setattr(common, "AT_ONCE", 3 * 64 * 768)
    seen = list(common.batches(data.train, 64, torch.Generator().manual_seed(0), lambda images, generator: images))
    assert sum(len(x) for x, _ in seen) == 1143 and all(len(x) == 64 for x, _ in seen[:-1])
    x = torch.cat([x for x, _ in seen])
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


# ---- the captured step, with the GPU's graph played by a fake

class FakeGraph:
    def replay(self):
        self.loss.copy_(self.step(self.x, self.labels))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_captured_run_equals_an_uncaptured_one(monkeypatch, momentum):
    class Recording:  # stands for torch.cuda.graph and runs the step once for real: a harsher test of the restoring
        def __init__(self, graph, stream):
            self.graph = graph

        def __enter__(self):
            pass

        def __exit__(self, *_):
            self.graph.x, self.graph.labels, self.graph.loss, self.graph.step = last
    for name, fake in {"Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "graph": Recording, "CUDAGraph": FakeGraph,
                       "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None)}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: __import__("contextlib").nullcontext())
    data, last, results = common.load_data(arguments(), CPU), [], []
    for capture in (False, True):
        torch.manual_seed(0)
        net = common.BACKBONES["small"](20)
        optimizer = torch.optim.SGD(net.parameters(), torch.tensor(0.1), momentum=momentum, weight_decay=1e-3, fused=True)

        def plain(x, labels):
            loss = F.cross_entropy(net.fc(net.features(x)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        def recorded(x, labels):
            loss = plain(x, labels)
            last[:] = x, labels, loss, plain
            return loss
        step = plain
        if capture:
            on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(is_cuda=True)]), state_dict=net.state_dict)
            step = common.captured(recorded, on_gpu, optimizer)
        generator, losses = torch.Generator().manual_seed(0), []
        for lr in (0.1, 0.03):
            common.set_lr(optimizer, lr)
            losses += [step(x, labels) for x, labels in common.batches(data.train, 500, generator)]
        results.append((torch.stack(losses), [v.clone() for v in net.state_dict().values()]))
    assert (results[0][0] == results[1][0]).all() and len(results[0][0]) == 6  # 500, 500 and 143 images, twice
    assert all((a == b).all() for a, b in zip(results[0][1], results[1][1]))


def test_on_a_cpu_the_step_is_not_wrapped():
    step = lambda x, labels: None  # noqa: E731
    assert common.captured(step, torch.nn.Linear(1, 1), None) is step


# ---- networks

def test_parameter_counts_and_shapes():
    sizes = {name: sum(p.numel() for p in make(100).parameters()) for name, make in common.BACKBONES.items()}
    assert sizes["resnet32"] == 470_004 and 21_300_000 < sizes["resnet34"] < 21_360_000
    assert sum(p.numel() for p in common.BACKBONES["resnet32"](10).parameters()) == 464_154
    for name, dim in (("resnet32", 64), ("resnet34", 512), ("small", 64)):
        net = common.BACKBONES[name](7)
        assert net.features(torch.randn(2, 3, 32, 32)).shape == (2, dim) and net.fc.weight.shape == (7, dim)


def test_the_shortcut_is_option_a():
    block = common.Block(16, 32, 2)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(2, 16, 8, 8)
    slow = torch.zeros(2, 32, 4, 4)
    slow[:, 8:24] = x[:, :, ::2, ::2]
    assert (block.eval()(x) == slow).all()


@pytest.mark.parametrize("classes, dim", [(2, 2), (10, 10), (100, 128)])
def test_simplex_etf(classes, dim):
    etf = common.simplex_etf(classes, dim, torch.Generator().manual_seed(0)).double()
    gram = etf @ etf.T
    assert etf.shape == (classes, dim)
    assert (gram - torch.where(torch.eye(classes).bool(), 1.0, -1 / (classes - 1))).abs().max() < 1e-6
    assert (common.simplex_etf(classes, dim, torch.Generator().manual_seed(1)) - etf).abs().max() > 0.01
    with pytest.raises(ValueError, match="dimensions"):
        common.simplex_etf(classes, classes - 1, torch.Generator())


# ---- scores

def test_report_by_hand():
    counts, labels = [101, 100, 20, 19], torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
    predicted = torch.tensor([0, 1, 1, 1, 2, 0, 0, 0, 3, 0])
    scores = common.report(F.one_hot(predicted, 4).float(), labels, counts)
    assert scores == {"all": pytest.approx((50 + 100 + 25 + 50) / 4), "many": 50.0, "medium": 62.5, "few": 50.0}
    assert common.report(torch.eye(2), torch.tensor([0, 1]), [500, 200]) == {"all": 100.0, "many": 100.0, "medium": None, "few": None}


def test_fisher_ratio_against_loops():
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 4, 200)
    feat = rng.randn(200, 6) + rng.randn(4, 6)[labels]
    mean, within, between = feat.mean(0), np.zeros((6, 6)), np.zeros((6, 6))
    for k in range(4):
        own = feat[labels == k]
        between += len(own) * np.outer(own.mean(0) - mean, own.mean(0) - mean)
        for f in own:
            within += np.outer(f - own.mean(0), f - own.mean(0))
    slow = np.trace(np.linalg.inv(within) @ between)
    assert common.fisher_ratio(torch.tensor(feat), torch.tensor(labels)) == pytest.approx(slow, rel=1e-9)
    dead = np.concatenate([feat, np.full((200, 2), 3.0)], 1)  # dimensions that never vary are left out
    assert common.fisher_ratio(torch.tensor(dead), torch.tensor(labels)) == pytest.approx(slow, rel=1e-9)
    absent = torch.tensor(labels + (labels > 1))  # no sample has label 2
    assert common.fisher_ratio(torch.tensor(feat), absent) == pytest.approx(slow, rel=1e-9)
    for bad in (feat[:3], feat[:, [0, 0]], np.ones((200, 6))):  # no variance within; a doubled dimension; nothing varies
        assert math.isnan(common.fisher_ratio(torch.tensor(bad), torch.tensor(labels[:len(bad)] if len(bad) > 3 else [0, 1, 2])))


def test_predict_is_plain_in_eval_mode_and_averages_the_mirror_image():
    data = common.load_data(arguments(), CPU)
    net = common.BACKBONES["small"](20).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    logits, feat = common.predict(net, data.test)
    assert net.training and all((before[k] == v).all() for k, v in net.state_dict().items())
    net.eval()
    x = ((data.test.images.float() - data.test.mean) / data.test.std).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert (net.features(x) - feat).abs().max() < 1e-5
        both = (net.fc(net.features(x)) + net.fc(net.features(x.flip(3)))) / 2
    assert (common.predict(net, data.test, flip=True)[0] - both).abs().max() < 1e-4


# ---- the table

def line(**changes):
    result = {"method": "rbl", "dataset": "cifar100", "imb_factor": 100.0, "seed": 0, "flags": {"seed": 0, "lr": 0.1},
              "seconds": 60.0, "command": "methods/rbl.py --seed 0 --out x",
              "rows": [{"row": "rbl", "acc": {"all": 50.0, "many": 70.0, "medium": 50.0, "few": None}, "acc_flip": None,
                        "paper": {"all": 53.1, "source": "Table 1"}}]}
    return result | changes


def test_table_means_and_deviations():
    other = json.loads(json.dumps(line(seed=1, flags={"seed": 1, "lr": 0.1})))
    other["rows"][0]["acc"]["all"] = 52.0
    text = common.table([line(), other, other])
    assert "| rbl | rbl | cifar100, 100 | 53.1 (Table 1) | 51.0 ± 1.4 |" in text and "| 0 1 |" in text
    assert "few" not in text and "best on test" not in text  # columns without a number are left out


def test_table_announces_what_was_not_run_until_it_is():
    announced = json.loads(json.dumps(line(seed=None, flags={}, seconds=None)))
    announced["rows"][0]["acc"] = None
    assert "not run" in common.table([announced])
    assert "not run" not in common.table([announced, line()]) and common.table([announced, line()]).count("\n") == 2
