"""common.py against slow references: the subset, the batches, the networks, the scores, the table."""
import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import common
from conftest import whole_synthetic

CIFAR = Path(os.environ.get("CIFAR_ROOT", Path(__file__).parents[1] / "data"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def all_images(monkeypatch):
    monkeypatch.setattr(common, "synthetic", whole_synthetic)


def arguments(**changes):
    args = common.base_parser("").parse_args(["--dataset", "synthetic"])
    return SimpleNamespace(**vars(args) | changes)


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
    assert common.first_of_each(common.shuffled_classes(labels, 5, 0), counts).tolist() == slow
    assert (np.random.get_state()[1] == before).all()
    assert common.first_of_each(common.shuffled_classes(labels, 5, 1), counts).tolist() != slow


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_fingerprints_on_the_real_data(name):
    if not (CIFAR / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]).is_dir():
        pytest.skip(f"no CIFAR files in {CIFAR} (CIFAR_ROOT names another folder)")
    parts, classes = common.cifar(name, CIFAR)
    _, labels = parts["train"]
    assert classes[:2] == {"cifar10": ["airplane", "automobile"], "cifar100": ["apple", "aquarium_fish"]}[name]
    for factor, fingerprint in common.FINGERPRINTS[name].items():
        counts = common.exp_counts(np.bincount(labels)[0], labels.max() + 1, factor)
        indices = common.first_of_each(common.shuffled_classes(labels, len(counts), 0), counts)
        assert hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16] == fingerprint
    data = common.load_data(arguments(dataset=name, data_root=CIFAR, val_per_class=20), CPU)
    assert data.subset["sha256"] == common.FINGERPRINTS[name][100]
    assert not rows(data.train.images) & (rows(data.val.images) - rows(data.test.images))


def test_a_wrong_subset_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(common, "FINGERPRINTS", {"synthetic": {100.0: "0" * 16}})
    with pytest.raises(SystemExit):
        common.load_data(arguments(), CPU)
    assert "not the standard" in capsys.readouterr().err
    subsets = [common.load_data(arguments(subset_seed=seed), CPU).subset["sha256"] for seed in (1, 2)]
    assert subsets[0] != subsets[1]


def test_cifar_has_its_usual_mean_and_deviation(monkeypatch):
    monkeypatch.setattr(common, "cifar", lambda *_: whole_synthetic())
    train = common.load_data(arguments(dataset="cifar10", imb_factor="natural"), CPU).train
    assert torch.allclose(train.mean, torch.tensor([125.307, 122.961, 113.8575]))  # 255 times 0.4914, 0.4822, 0.4465
    assert torch.allclose(train.std, torch.tensor([51.5865, 50.847, 51.255]))      # 255 times 0.2023, 0.1994, 0.2010


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

@pytest.mark.parametrize("flags, pad", [({}, 4), ({"pad": 2}, 2), ({"pad": 0}, 0)])
def test_crop_and_flip_equal_the_slow_version(flags, pad):
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    fast = common.crop_flip(images, torch.Generator().manual_seed(3), **flags)
    draws = torch.Generator().manual_seed(3)
    top, left = torch.randint(0, 2 * pad + 1, (2, 40), generator=draws)
    mirror = torch.rand(40, 1, 1, 1, generator=draws).flatten() < 0.5
    for k in range(40):
        image = ImageOps.expand(Image.fromarray(images[k].numpy()), pad, 0)
        image = image.crop((int(left[k]), int(top[k]), int(left[k]) + 32, int(top[k]) + 32))
        image = ImageOps.mirror(image) if mirror[k] else image
        assert (np.asarray(image) == fast[k].numpy()).all()


def test_crop_offsets_are_uniform_and_half_are_flipped():
    position = torch.arange(32 * 32).view(32, 32)
    image = torch.stack([position // 32 + 1, position % 32 + 1, torch.zeros_like(position)], 2).to(torch.uint8)
    out = common.crop_flip(image.expand(20000, 32, 32, 3), torch.Generator().manual_seed(0))
    down = out[:, 16, 16, 0].long() - 13  # which row lies at row 16: 16 - 4 + top + 1
    assert torch.bincount(down, minlength=9).min() > 2000 and down.max() == 8 and down.min() == 0
    flipped = out[:, 16, 10, 1] > out[:, 16, 20, 1]
    assert 0.48 < flipped.double().mean() < 0.52


@pytest.mark.parametrize("n, batch_size", [(100, 1), (100, 7), (100, 64), (100, 100), (100, 1000), (101, 100), (71, 7)])
def test_an_epoch_holds_every_image_once(n, batch_size):
    """But for a single image that would be a last batch of its own, another one each epoch."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 4, 4, 3)
    split = common.Split(images, torch.arange(n) % 10, torch.zeros(3), torch.ones(3))
    generator, orders = torch.Generator().manual_seed(0), []
    for _ in range(2):
        batches = list(common.batches(split, batch_size, generator, lambda images, generator: images))
        assert [len(x) for x, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
        x, labels = (torch.cat(parts) for parts in zip(*batches))
        order = x[:, 0, 0, 0].long()
        alone = batch_size > 1 and n % batch_size == 1
        assert len(order.unique()) == len(order) == n - alone and (labels == order % 10).all()
        orders.append(order.tolist())
    assert orders[0] != orders[1] and all(len(x) > 1 or batch_size == 1 for x, _ in batches)


def test_batches_in_several_parts_are_whole_and_normalised(monkeypatch):
    data = common.load_data(arguments(), CPU)
    monkeypatch.setattr(common, "AT_ONCE", 3 * 64 * 768)
    seen = list(common.batches(data.train, 64, torch.Generator().manual_seed(0), lambda images, generator: images))
    assert sum(len(x) for x, _ in seen) == 1143 and all(len(x) == 64 for x, _ in seen[:-1])
    x = torch.cat([x for x, _ in seen])
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_training_images_are_cropped_and_flipped():
    data, draws = common.load_data(arguments(), CPU), torch.Generator().manual_seed(0)
    x = torch.cat([x for x, _ in common.batches(data.train, 64, torch.Generator().manual_seed(0))])
    images = common.crop_flip(data.train.images[torch.randperm(1143, generator=draws)], draws)
    assert torch.allclose(x, ((images - data.train.mean) / data.train.std).permute(0, 3, 1, 2))


# ---- the captured step, with the GPU's graph played by a fake

class FakeGraph:
    def replay(self):
        self.loss.copy_(self.step(self.x, self.labels))


def fake_cuda(monkeypatch, graph):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {"Stream": lambda: stream, "graph": graph, "CUDAGraph": FakeGraph, "current_stream": lambda: stream,
                       "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("broken", ["warm-up", "capture", "replay"])
def test_where_capturing_fails_training_goes_on_from_the_same_state(monkeypatch, capsys, broken):
    class Graph(contextlib.nullcontext):
        def __init__(self, graph, stream):
            super().__init__()
            if broken == "capture":
                raise RuntimeError("operation not permitted when stream is capturing")

    def replay(graph):
        raise RuntimeError("CUDA error: launch failed")
    fake_cuda(monkeypatch, Graph)
    monkeypatch.setattr(FakeGraph, "replay", replay)
    weights = []
    for on_gpu in (False, True):
        torch.manual_seed(0)
        net, calls = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)), [0]
        optimizer = torch.optim.SGD(net.parameters(), torch.tensor(0.1), momentum=0.9, fused=True)

        def step(x, labels):
            calls[0] += 1
            loss = F.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_gpu and broken == "warm-up" and calls[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss.detach()
        where = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(is_cuda=on_gpu)]), state_dict=net.state_dict)
        run = common.captured(step, where, optimizer)
        for n in (4, 4, 3):
            run(torch.ones(n, 3) * torch.arange(n)[:, None], torch.zeros(n, dtype=torch.long))
        weights.append([value.clone() for value in net.state_dict().values()])
    assert all((a == b).all() for a, b in zip(*weights))
    assert capsys.readouterr().out.count("not captured") == 2  # once for each batch size


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_captured_run_equals_an_uncaptured_one(monkeypatch, momentum):
    class Recording:  # stands for torch.cuda.graph and runs the step once for real: a harsher test of the restoring
        def __init__(self, graph, stream):
            self.graph = graph

        def __enter__(self):
            pass

        def __exit__(self, *_):
            self.graph.x, self.graph.labels, self.graph.loss, self.graph.step = last
    fake_cuda(monkeypatch, Recording)
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
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(is_cuda=True)]))
    assert common.captured(step, on_gpu, None, enabled=False) is step


# ---- networks

def test_parameter_counts_and_shapes():
    names = ("resnet32", "resnet32_bn", "resnet34")
    sizes = {name: sum(p.numel() for p in common.BACKBONES[name](100).parameters()) for name in names}
    assert sizes["resnet32"] == 470_004 == sizes["resnet32_bn"] - 128 and sizes["resnet34"] == 21_328_292
    assert common.BACKBONES["resnet34"](7).body(torch.randn(2, 3, 32, 32)).shape == (2, 512, 4, 4)
    assert sum(p.numel() for p in common.BACKBONES["resnet32"](10).parameters()) == 464_154
    for name, dim in (("resnet32", 64), ("resnet32_bn", 64), ("resnet34", 512), ("small", 64)):
        net = common.BACKBONES[name](7)
        feat = net.features(torch.randn(8, 3, 32, 32))
        assert (feat.min() < 0) == (name == "resnet32_bn")
        assert feat.mean(0).abs().max() < 1e-5 or name != "resnet32_bn"  # normalised over images and pixels
        assert feat.shape == (8, dim) and net.fc.weight.shape == (7, dim)


@pytest.mark.parametrize("width, stride", [(16, 1), (32, 2)])
def test_a_block_is_two_convolutions_and_a_shortcut_of_option_a(width, stride):
    def bn(y):
        variance = y.var((0, 2, 3), correction=0, keepdim=True)
        return (y - y.mean((0, 2, 3), keepdim=True)) / (variance + 1e-5).sqrt()
    block, x = common.Block(16, width, stride).double(), torch.randn(4, 16, 8, 8).double()
    y = bn(F.conv2d(x, block.conv1.weight, stride=stride, padding=1)).relu()
    y = bn(F.conv2d(y, block.conv2.weight, padding=1))
    first = (width - 16) // 2
    y[:, first:first + 16] += x[:, :, ::stride, ::stride]
    before = x.clone()
    assert torch.allclose(block(x), y.relu()) and (x == before).all()


@pytest.mark.parametrize("classes, dim", [(2, 2), (10, 10), (100, 128)])
def test_simplex_etf(classes, dim):
    etf = common.simplex_etf(classes, dim, torch.Generator().manual_seed(0)).double()
    gram = etf @ etf.T
    assert etf.shape == (classes, dim)
    assert (gram - torch.where(torch.eye(classes).bool(), 1.0, -1 / (classes - 1))).abs().max() < 1e-6
    assert (common.simplex_etf(classes, dim, torch.Generator().manual_seed(1)) - etf).abs().max() > 0.01
    with pytest.raises(SystemExit):
        common.simplex_etf(classes, classes - 1, torch.Generator())


# ---- scores

def test_report_by_hand():
    counts, labels = [101, 100, 20, 19], torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
    predicted = torch.tensor([0, 1, 1, 1, 2, 0, 0, 0, 3, 0])
    scores = common.report(F.one_hot(predicted, 4).float(), labels, counts)
    assert scores == {"all": pytest.approx((50 + 100 + 25 + 50) / 4), "many": 50.0, "medium": 62.5, "few": 50.0}
    assert common.report(torch.eye(2), torch.tensor([0, 1]), [500, 200]) == {"all": 100.0, "many": 100.0, "medium": None, "few": None}
    absent = common.report(torch.eye(3)[:2], torch.tensor([0, 1]), [500, 200, 5])  # no image of the third class
    assert absent == {"all": 100.0, "many": 100.0, "medium": None, "few": None}


def test_the_best_accuracy_on_the_test_set_is_kept():
    data = SimpleNamespace(test=SimpleNamespace(labels=torch.tensor([0, 1])), counts=[5, 5])
    run = SimpleNamespace(best_test=None, history=[{}], data=data)
    for logits in (torch.eye(2), torch.eye(2).flip(0)):
        common.Run.keep_best(run, logits)
    assert run.best_test == 100


def test_features_are_of_plain_or_flipped_images_in_eval_mode():
    data = common.load_data(arguments(), CPU)
    net = common.BACKBONES["small"](20).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    feat = common.features(net, data.test)
    assert net.training and all((before[k] == v).all() for k, v in net.state_dict().items())
    net.eval()
    x = ((data.test.images.float() - data.test.mean) / data.test.std).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert (net.features(x) - feat).abs().max() < 1e-5
        assert (net.features(x.flip(3)) - common.features(net, data.test, flipped=True)).abs().max() < 1e-5


def test_an_affine_map_is_a_linear_layer():
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    linear = common.as_linear(lambda feat: 2 * net(feat) - torch.tensor([1.0, 2.0, 3.0]), 5, CPU)
    feat = torch.randn(11, 5)
    assert torch.allclose(linear(feat), 2 * net(feat) - torch.tensor([1.0, 2.0, 3.0]), atol=1e-5)
    assert common.as_linear(net[0], 5, CPU) is net[0]


# ---- the table

def line(**changes):
    scores = {"all": 50.0, "many": 70.0, "medium": 50.0, "few": None}
    row = {"row": "rbl", "acc": scores, "acc_flip": scores, "best_test": None,
           "paper": {"all": 53.1, "reading": "best epoch", "source": "poster, Table 1"}}
    run = {"method": "rbl", "dataset": "cifar100", "imb_factor": 100.0, "seed": 0, "flags": {"seed": 0, "lr": 0.1}, "rows": [row],
           "subset": {"sha256": "e0d5"}, "seconds": 60.0, "device": "CPU", "command": "methods/rbl.py --seed 0 --out 'a b' --lr 1"}
    return json.loads(json.dumps(run | changes))


def test_table_means_and_deviations():
    other = line(seed=1, flags={"seed": 1, "lr": 0.1})
    other["rows"][0]["acc"]["all"] = 52.0
    text = common.table([line(), other, other])
    assert "| rbl | rbl | 53.1 best epoch [1] | 51.0 ± 1.4 | 70.0 ± 0.0 / 50.0 ± 0.0 / - |" in text
    assert "| 0 1 | 1 min, CPU | `methods/rbl.py --lr 1` |" in text and text.endswith("[1] poster, Table 1")
    assert text.startswith("cifar100, imbalance: factor 100\n")


def test_durations():
    texts = {3.21: "3.2 s", 59: "59 s", 60: "1 min", 7380: "2 h", 7380 + 720: "2.2 h", 20 * 3600: "20 h", 100 * 3600: "100 h"}
    assert {seconds: common.duration(seconds) for seconds in texts} == texts


def test_table_keeps_apart_what_differs():
    runs = [line(), line(flags={"seed": 0, "lr": 0.2}), line(subset={"sha256": "other"}), line(dataset="cifar10")]
    text = common.table(runs)
    assert text.count("| rbl | rbl |") == 4 and "cifar10, imbalance" in text
    stage1 = [line(flags={"stage1": f"runs/wd-seed{k}/weights.pt", "stage1_sha256": str(k)}, seed=k) for k in (0, 1)]
    assert common.table(stage1).count("| rbl | rbl |") == 1
    other = line(flags={"stage1": "runs/wd-seed1/weights.pt", "stage1_sha256": "1"})
    assert "| 0 0 |" in common.table([stage1[0], other])  # one seed, two networks


def test_results_of_a_folder_and_of_a_file(tmp_path, capsys):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "result.json").write_text(json.dumps(line()))
    (tmp_path / "all.jsonl").write_text(json.dumps(line()) + "\n\n" + json.dumps(line(seed=1)))
    assert common.load_results(tmp_path / "runs") == [line()]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(tmp_path / "runs" / "a")
    assert common.load_results(tmp_path / "linked") == [line()]
    assert common.load_results(tmp_path / "all.jsonl") == [line(), line(seed=1)]
    assert common.load_results(tmp_path / "runs" / "a" / "result.json") == [line()]
