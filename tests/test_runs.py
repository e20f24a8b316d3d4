"""Whole runs: repeatable, resumable, honest about the test set; results are neither lost nor mixed."""
import importlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
from conftest import ROOT, SCRIPTS, log_of, result, results, same, saved

TINY = ("--epochs", "2", "--imb-factor", "100")
VARIANTS = ("ce", "cb", "wd", "wb", "etf", "fr-etf")
MODES = {"ewb_fdr": [("--variant", v) for v in VARIANTS] + [("--variant", "wb", "--cb-loss", "ce")],
         "hinge_ce": [("--variant", v) for v in ("ce", "ce-etf")] + [("--tau-plus", "1.5"), ("--tau-minus", "0.9", "--minor", "1")],
         "lort": [(), ("--bn", "eval"), ("--retrain", "all")],
         "lwr": [("--base", b) for b in ("bs", "ce-drw", "focal", "la")] + [("--project", "no", "--schedule", "const", "--theta", "0")],
         "rbl": [("--head", h) for h in ("rbl", "fixed", "linear")] + [("--augment", "strong", "--deterministic")]}
DECAY = {("ewb_fdr", "ce"): [[0]], ("ewb_fdr", "cb"): [[0]], ("ewb_fdr", "wb"): [[1e-3], [0.1]], "ewb_fdr": [[1e-3]],
         "hinge_ce": [[2e-4, 0]], "lort": [[1e-3], [0]], ("lort", "all"): [], "lwr": [[5e-4]], "rbl": [[5e-4]]}  # by group
TRAINED = {}  # (script, mode) -> the weights that it gave


RUNS = [(script, ()) for script in SCRIPTS] + [("lort", ("--retrain", "all"))]


def interrupt(*_, **__):
    raise KeyboardInterrupt


whole_load_data = common.load_data  # some tests replace it


def synthetic_data(*flags):
    args = common.base_parser("").parse_args(["--dataset", "synthetic", *flags])
    return whole_load_data(args, torch.device("cpu"))


@pytest.fixture(scope="session")
def wd(tmp_path_factory):
    """weights.pt of a wd run, which holds 10 images a class out."""
    out = tmp_path_factory.mktemp("wd")
    flags = ["--variant", "wd", "--dataset", "synthetic", "--device", "cpu", "--out", str(out), *TINY]
    importlib.import_module("ewb_fdr").main(flags)
    return next(out.glob("*/weights.pt"))


@pytest.fixture
def call(call, wd):
    """--retrain gets the --stage1 that it needs."""
    def with_stage1(script, *flags, **kwargs):
        if "--retrain" in flags and "--stage1" not in flags:
            flags += ("--stage1", wd)
        return call(script, *flags, **kwargs)
    return with_stage1


def test_every_script_is_listed():
    assert sorted(MODES) == SCRIPTS


def alike(a, b):
    """Are these two networks the same but for rounding?"""
    if {name: value.shape for name, value in a.items()} != {name: value.shape for name, value in b.items()}:
        return False
    return all(torch.allclose(a[name].float(), b[name].float(), rtol=1e-3, atol=1e-4) for name in a)


@pytest.mark.parametrize("script, mode", [(script, mode) for script in SCRIPTS for mode in MODES[script]])
def test_every_mode_runs_without_a_warning(call, tmp_path, capsys, recwarn, monkeypatch, script, mode):
    optimizers, real = [], common.Run.captured

    def captured(run, step, net, optimizer):
        optimizers.append(optimizer)
        return real(run, step, net, optimizer)
    monkeypatch.setattr(common.Run, "captured", captured)
    assert call(script, *TINY, *mode) == 0
    groups = [optimizer.param_groups for optimizer in optimizers]
    assert [[group["weight_decay"] for group in of_one] for of_one in groups] == DECAY.get((script, *mode[1:2]), DECAY[script])
    for group in sum(groups, []):
        assert group["momentum"] == 0.9 and group["nesterov"] == (script in ("rbl", "hinge_ce"))
    out, runs = capsys.readouterr().out, tmp_path / "runs"
    run, folder = result(runs), next(runs.glob("*/"))
    assert run["method"] == script and run["subset"]["sha256"] in out and "| many / medium / few |" in out
    assert not list(folder.glob("*.ckpt")) and not [str(w.message) for w in recwarn]
    kept = saved(runs, "test_logits.pt")
    assert set(kept) == {"logits", "labels", "counts", "classes", "rows", "strengths"}
    assert kept["logits"].shape == (340, 20) and len(kept["classes"]) == 20 and run["headline"] in kept["rows"]
    for row in run["rows"]:  # every number of the table can be computed from the file
        assert row["acc"] == common.report(kept["rows"][row["row"]], kept["labels"], kept["counts"])
        assert all(0 <= row[kind][group] <= 100 for kind in ("acc", "acc_flip") for group in ("all", "many", "few"))
        assert kept["strengths"][row["row"]] == row["strength"]
    stages = {}
    for line in log_of(runs):
        stages.setdefault(line["stage"], []).append(line)
    first = next(iter(stages.values()))
    other_loss = "--tau-minus" in mode or "ce-drw" in mode  # of the last epoch, or a loss that is hard to lower
    assert first[-1]["loss"] < first[0]["loss"] or other_loss
    assert all(lines[-1]["lr"] != lines[0]["lr"] for lines in stages.values())
    TRAINED[script, mode] = saved(runs)["net"]
    others = [other for other in MODES[script] if other != mode and (script, other) in TRAINED]
    assert not [other for other in others if alike(TRAINED[script, mode], TRAINED[script, other])]

    # load_network() gives the outputs of every row, whatever the script made of the classifier
    data = synthetic_data()
    rows = saved(runs)["rows"]  # without lort's "stage 1", which is another network
    assert run["headline"] in rows
    flip = {row["row"]: row["acc_flip"]["all"] for row in run["rows"]}
    for row in (None, *rows):
        net, file = common.load_network(folder / "weights.pt", row)
        split = data.test._replace(mean=file["mean"], std=file["std"])
        plain, flipped = (net.fc(common.features(net, split, flipped)) for flipped in (False, True))
        assert torch.allclose(plain, kept["rows"][row] if row else kept["logits"], atol=1e-4, rtol=1e-4)
        if row:
            of_both = common.report(plain + flipped, kept["labels"], kept["counts"])["all"]
            assert flip[row] == pytest.approx(of_both, abs=0.4)  # rounding may turn one of 340


def test_a_link_named_like_a_set_does_not_change_the_folder(call, monkeypatch, tmp_path):
    (tmp_path / "synthetic").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert call("lwr", *TINY) == 0 and (tmp_path / "runs/lwr-bs+lwr-synthetic-if100-seed0/result.json").exists()


@pytest.mark.parametrize("script, mode", RUNS)
def test_the_same_command_gives_the_same_numbers(call, tmp_path, script, mode):
    for out in ("a", "b"):
        assert call(script, *TINY, *mode, out=tmp_path / out) == 0
    a, b = (result(tmp_path / out) for out in ("a", "b"))
    assert a["rows"] == b["rows"] and a["metrics"] == b["metrics"]
    assert same(saved(tmp_path / "a")["net"], saved(tmp_path / "b")["net"])
    assert call(script, *TINY, *mode, "--seed", "1", out=tmp_path / "c") == 0
    assert not same(saved(tmp_path / "a")["net"], saved(tmp_path / "c")["net"])


@pytest.mark.parametrize("script, mode", RUNS)
def test_neither_test_nor_validation_images_reach_the_weights(call, tmp_path, monkeypatch, script, mode):
    """With other test images the weights and every choice stay. With other validation images the weights stay too, but that
    --retrain chooses among trained classifiers by them: it trains the same ones and chooses others."""
    flags = (*TINY, *mode, "--eval-every", "1", "--val-per-class", "10")
    run, net, losses = {}, {}, {}
    for change in ("nothing", "test", "val"):
        def load(args, device):
            data = whole_load_data(args, device)
            if change == "nothing":
                return data
            part = getattr(data, change)
            return data._replace(**{change: part._replace(images=255 - part.images, labels=part.labels.flip(0))})
        monkeypatch.setattr(common, "load_data", load)
        assert call(script, *flags, out=tmp_path / change) == 0
        run[change], net[change] = result(tmp_path / change), saved(tmp_path / change)["net"]
        losses[change] = [line["loss"] for line in log_of(tmp_path / change)]
    assert same(net["nothing"], net["test"]) and losses["nothing"] == losses["test"] == losses["val"]
    assert run["nothing"]["rows"][0]["acc"] != run["test"]["rows"][0]["acc"]
    if mode:
        chosen = [{row["row"]: run[change]["metrics"].get(row["row"]) for row in run[change]["rows"]} for change in run]
        assert chosen[0] == chosen[1] != chosen[2] and run["nothing"]["rows"][0] == run["val"]["rows"][0]
        net = {change: {name: value for name, value in net[change].items() if not name.startswith("fc.")} for change in net}
    assert same(net["nothing"], net["val"])
    found, file = common.load_network(next(tmp_path.glob("nothing/*/weights.pt")), run["nothing"]["headline"])
    data = common.normalised_as(synthetic_data("--val-per-class", "10"), file["mean"], file["std"])
    slow = common.report(found.fc(common.features(found, data.val)), data.val.labels, data.counts)
    assert run["nothing"]["metrics"]["val"] == pytest.approx(slow, abs=2)  # rounding may turn one of 200, or of a group's 60
    if script == "ewb_fdr":
        strengths = {change: [row["strength"] for row in run[change]["rows"]] for change in run}
        assert strengths["nothing"] == strengths["test"]
    else:  # by which flags may be chosen
        val = [run[change]["metrics"]["val"] for change in ("nothing", "test", "val")]
        assert val[0] == val[1] != val[2] and 0 < val[0]["all"] < 100 and val[0]["few"] is not None


@pytest.mark.parametrize("script, flags, names", [
    ("lwr", ("--base", "la", "--strength", "0"), ["ce", "la"]),
    ("rbl", (), ["rbl, no adjustment", "rbl"]),
    ("ewb_fdr", (), ["fr-etf", "fr-etf + additive LA", "fr-etf + multiplicative LA"])])  # its rows have norm 1 as they are
def test_the_network_is_scored_plain_and_adjusted(call, tmp_path, script, flags, names):
    assert call(script, *TINY, *flags) == 0
    rows, kept = result(tmp_path / "runs")["rows"], saved(tmp_path / "runs", "test_logits.pt")
    assert [row["row"] for row in rows] == names
    assert rows[0]["acc"] == common.report(kept["logits"], kept["labels"], kept["counts"]) != rows[1]["acc"]
    prior = kept["counts"] / kept["counts"].sum()
    for row in rows[1:]:
        slow = kept["logits"] - row["strength"] * prior.log()
        if "multiplicative" in row["row"]:
            slow = kept["logits"] * prior ** -row["strength"]
        assert row["strength"] > 0
        assert torch.allclose(kept["rows"][row["row"]].log_softmax(1), slow.log_softmax(1), atol=1e-4)


def test_the_adjustments_of_wd_begin_with_vectors_of_norm_one(wd):
    """The multiplicative one and its gamma, slowly; an ETF has such vectors as it is. And the recorded scale of BatchNorm."""
    kept, net = common.load(wd.parent / "test_logits.pt"), common.load(wd)["net"]
    w, b, prior = net["fc.weight"], net["fc.bias"], kept["counts"] / kept["counts"].sum()

    def slow(logits, gamma):
        return ((logits - b) / w.norm(dim=1) + b) * prior ** -gamma
    gamma = kept["strengths"]["wd + multiplicative LA"]
    assert torch.allclose(kept["rows"]["wd + multiplicative LA"], slow(kept["logits"], gamma), atol=1e-4)
    network, file = common.load_network(wd)
    data = synthetic_data("--val-per-class", "20")
    data = common.normalised_as(data, file["mean"], file["std"])
    logits = network.fc(common.features(network, data.val))
    scores = [common.report(slow(logits, k / 20), data.val.labels, data.counts)["all"] for k in range(61)]
    assert gamma == scores.index(max(scores)) / 20
    scales = [value.mean().item() for name, value in net.items() if re.search(r"bn\d?\.weight", name)]
    assert len(scales) == 7 and result(wd.parents[1])["metrics"]["batchnorm_scale"] == pytest.approx(sum(scales) / 7, rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_near_fp32_and_keeps_the_weights_in_fp32(call, tmp_path, script):
    for precision in ("fp32", "bf16"):
        assert call(script, *TINY, "--precision", precision, out=tmp_path / precision) == 0
    a, b = (result(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert (a["flags"]["precision"], b["flags"]["precision"]) == ("fp32", "bf16")
    losses = [log_of(tmp_path / precision)[0]["loss"] for precision in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    net = saved(tmp_path / "bf16")["net"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in net.values())
    assert not same(saved(tmp_path / "fp32")["net"], net)


@pytest.mark.parametrize("script, base, limit, full", [
    ("lwr", ("--strength", 0), ("--theta", 1), ("--theta", 0.0, "--strength", 5)),
    ("hinge_ce", ("--variant", "ce-etf"), ("--tau-plus", 0.01), ("--tau-plus", 1.5)),  # empty cones are none
    ("ewb_fdr", ("--variant", "etf"), ("--zeta", 0), ())])
def test_a_method_in_its_limit_is_its_base(call, tmp_path, script, base, limit, full):
    for name, flags in (("base", base), ("limit", limit), ("full", full)):
        assert call(script, *TINY, *flags, out=tmp_path / name) == 0
    nets = [saved(tmp_path / name)["net"] for name in ("base", "limit", "full")]
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])
    if script == "hinge_ce":
        inside = [result(tmp_path / name)["metrics"]["inside_the_cones"] for name in ("limit", "full")]
        assert inside[0] == 0 < inside[1]


def test_the_ramp_of_lwr_begins_at_zero(call, tmp_path):
    nets = {}
    for name, flags in {"base": ("--strength", "0"), "ramp": ("--theta", "-1"), "const": ("--theta", "-1", "--schedule", "const")}.items():
        assert call("lwr", "--epochs", "1", *flags, out=tmp_path / name) == 0
        nets[name] = saved(tmp_path / name)["net"]
    assert same(nets["base"], nets["ramp"]) and not same(nets["base"], nets["const"])


def test_eval_every_reports_the_best_and_changes_nothing(call, tmp_path):
    for every in ("0", "1", "9"):
        assert call("hinge_ce", *TINY, "--eval-every", every, out=tmp_path / every) == 0
    never, always, last = (result(tmp_path / every)["rows"][0] for every in ("0", "1", "9"))
    assert never["best_test"] is None and last["best_test"] == last["acc"]["all"]
    assert always["best_test"] >= always["acc"]["all"] and never["acc"] == always["acc"]


def test_the_best_on_test_stands_beside_the_row_that_was_tested(call, tmp_path):
    above = {}
    for script, flags in {"lort": ("--epochs2", 1), "ewb_fdr": ("--variant", "wd"), "rbl": ()}.items():
        assert call(script, *TINY, "--eval-every", "1", *flags, out=tmp_path / script) == 0
        for row in result(tmp_path / script)["rows"]:
            above[row["row"]] = None if row["best_test"] is None else row["best_test"] - row["acc"]["all"]
    assert above["lort"] == 0  # stage 2 was one epoch: the best is the last
    assert min(above["stage 1"], above["wd"], above["rbl"]) >= 0
    assert above["wd + additive LA"] is above["wd + multiplicative LA"] is above["rbl, no adjustment"] is None


def test_rbl_keeps_its_curves(call, tmp_path):
    assert call("rbl", *TINY, "--eval-every", "1") == 0
    kept = saved(tmp_path / "runs", "test_logits.pt")
    log = log_of(tmp_path / "runs")
    accuracy, loss = log[-1]["test_acc_ce"]
    assert accuracy == pytest.approx(result(tmp_path / "runs")["rows"][1]["acc"]["all"])  # the test set is balanced
    assert loss == pytest.approx(F.cross_entropy(kept["rows"]["rbl"], kept["labels"]).item())
    assert all("train_acc_ce" in line for line in log)
    net, _ = common.load_network(next(tmp_path.glob("runs/*/weights.pt")))
    train = synthetic_data().train
    logits = net.fc(common.features(net, train))  # without the adjustment
    assert log[-1]["train_acc_ce"][0] == pytest.approx(100 * (logits.argmax(1) == train.labels).float().mean().item(), abs=0.4)
    assert log[-1]["train_acc_ce"][1] == pytest.approx(F.cross_entropy(logits, train.labels).item(), rel=1e-3)


# ---- stage 1 from a file

def test_stage_one_of_other_data_is_refused(call, refused, tmp_path, monkeypatch):
    assert call("lort", "--epochs", "1", "--imb-factor", "10") == 0
    stage1, = tmp_path.glob("runs/*/stage1.pt")
    refused("lort", "--imb-factor", "100", "--stage1", stage1, words=["--imb-factor 10"])
    refused("lort", "--imb-factor", "10", "--val-per-class", "10", "--stage1", stage1, out=tmp_path / "val",
            words=["--val-per-class"])  # it was trained on these
    refused("lort", "--imb-factor", "10", "--subset-seed", "1", "--stage1", stage1, out=tmp_path / "seed", words=["--subset-seed 0, not 1"])
    parts, classes = common.synthetic()
    parts["test"] = 255 - parts["test"][0], parts["test"][1]
    monkeypatch.setattr(common, "synthetic", lambda: (parts, classes))
    refused("lort", "--imb-factor", "10", "--stage1", stage1, out=tmp_path / "other", words=["other images"])


def test_stage_one_may_not_be_exchanged_in_between(call, refused, tmp_path, monkeypatch, capsys, wd):
    stage1 = shutil.copy(wd, tmp_path / "stage1.pt")
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish", interrupt)
        assert call("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "new") == 130
    capsys.readouterr()
    other = common.load(wd)
    other["linear"]["fc.bias"] += 1
    torch.save(other, stage1)
    refused("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "new", words=["another --stage1"])


def test_a_run_may_be_stopped_and_go_on_in_a_notebook(call, monkeypatch, tmp_path):
    """In one process, with a stdout that is no file."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish", interrupt)
        assert call("lwr", *TINY) == 130
    assert call("lwr", *TINY) == 0
    assert "resumed after epoch 2" in sys.stdout.getvalue()


def test_the_stage_one_of_a_finished_run_may_be_moved(call, tmp_path, wd):
    flags = ("--imb-factor", "100", "--epochs2", "1", "--stage1")
    stage1 = shutil.copy(wd, tmp_path / "stage1.pt")
    assert call("lort", *flags, stage1) == 0
    path, = tmp_path.glob("runs/*/result.json")
    when = path.stat().st_mtime_ns
    assert call("lort", *flags, stage1.rename(tmp_path / "moved.pt")) == 0
    assert path.stat().st_mtime_ns == when


def test_stage_one_is_handed_over_with_its_normalisation(call, tmp_path, wd):
    """wd holds images out, lort does not: their training images, and so their means, differ."""
    assert call("lort", "--imb-factor", "100", "--stage1", wd) == 0
    before, after = result(wd.parents[1]), result(tmp_path / "runs")
    assert after["rows"][0]["acc"] == before["rows"][0]["acc"] and after["rows"][0]["acc_flip"] == before["rows"][0]["acc_flip"]
    assert torch.equal(saved(tmp_path / "runs")["mean"], common.load(wd)["mean"])
    assert after["metrics"]["stage 1 was trained with"]["val_per_class"] == 20
    plain = synthetic_data()
    assert not torch.equal(saved(tmp_path / "runs")["mean"], plain.test.mean)


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_stage_two_of_lort_retrains_the_classifier_alone(call, tmp_path, bn):
    assert call("lort", *TINY, "--epochs2", "2", "--bn", bn) == 0
    before, after = saved(tmp_path / "runs", "stage1.pt")["net"], saved(tmp_path / "runs")["net"]
    statistics = {name for name in before if "running" in name or "tracked" in name}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"fc.weight", "fc.bias"} | (statistics if bn == "train" else set())
    targets = torch.tensor([0.02 + 0.98 / 20] + 19 * [0.98 / 20])
    entropy = -(targets * targets.log()).sum().item()  # the loss with these targets is never smaller
    losses = {stage: [line["loss"] for line in log_of(tmp_path / "runs") if line["stage"] == stage] for stage in ("stage1", "stage2")}
    assert min(losses["stage1"]) < entropy < min(losses["stage2"])


def test_lort_does_not_retrain_a_retrained_classifier(call, refused, tmp_path):
    assert call("lort", *TINY) == 0 and call("ewb_fdr", *TINY, "--variant", "wb") == 0
    for script in ("lort", "ewb_fdr"):
        stage1, = tmp_path.glob(f"runs/{script}-*/weights.pt")
        refused("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "x", words=["a retrained classifier", "stage1.pt"])


def test_stage_one_was_trained_as_is_asked_for(call, refused, tmp_path):
    assert call("lwr", *TINY) == 0
    stage1, = tmp_path.glob("runs/*/weights.pt")
    for epochs in (77, 15):  # 15: as trained by lort itself
        refused("lort", "--stage1", stage1, "--epochs", epochs, out=tmp_path / "x", words=[f"--epochs 2, not {epochs}"])
    refused("lort", "--stage1", stage1, "--weight-decay", "0.5", out=tmp_path / "x", words=["--weight-decay 0.0005, not 0.5"])
    assert call("lort", "--stage1", stage1, "--epochs", "2", "--epochs2", "1", out=tmp_path / "lort") == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_lort_goes_on_from_the_network_of_any_script(call, tmp_path, script):
    """Its first row is that network; each of the others starts there."""
    assert call(script, *TINY, "--val-per-class", "20") == 0
    stage1, = tmp_path.glob("runs/*/stage1.pt" if script == "lort" else "runs/*/weights.pt")
    assert call("lort", "--retrain", "all", "--stage1", stage1, "--epochs2", "1", out=tmp_path / "lort") == 0
    assert call("lort", "--stage1", stage1, "--epochs2", "1", out=tmp_path / "stage2") == 0
    before = result(tmp_path / "runs")["rows"][0]["acc"]  # before any adjustment
    for run in (result(tmp_path / "stage2"), result(tmp_path / "lort")):
        assert run["rows"][0]["row"] == "stage 1" and run["rows"][0]["acc"] == before
        assert run["flags"]["epochs"] is None and run["metrics"]["stage 1 was trained with"]["epochs"] == 2
    rows = saved(tmp_path / "lort")["rows"]
    w, b = rows["stage 1"].values()
    changed = {row for row, linear in rows.items() if not torch.allclose(linear["weight"], w, atol=1e-5)}
    assert changed | {"tau-norm"} == set(rows) - {"stage 1", "la"}  # the vectors of an ETF have norm 1 as it is
    for row in ("lws", "tau-norm"):  # every class's vector has another length (of lws maybe a negative one), no other direction
        assert torch.allclose(F.cosine_similarity(rows[row]["weight"], w).abs(), torch.ones(20), atol=1e-4)
        assert torch.allclose(rows[row]["bias"], b, atol=1e-5)
    counts, tau = saved(tmp_path / "lort", "test_logits.pt")["counts"], run["metrics"]["la"]["s"]
    assert torch.allclose(rows["la"]["bias"], b - tau * counts.log(), atol=1e-4)
    assert (rows["cosine"]["bias"] == 0).all()
    assert same({"weight": saved(tmp_path / "lort")["net"]["fc.weight"]}, {"weight": rows["lort"]["weight"]})


def test_table_1_chooses_on_validation_images(call, tmp_path):
    """Every choice has the recorded accuracy on them, and none of the row's other classifiers has more."""
    assert call("lort", "--retrain", "all") == 0
    run, kept = result(tmp_path / "runs"), saved(tmp_path / "runs")
    data = synthetic_data("--val-per-class", "20")
    for row in kept["rows"]:
        net, file = common.load_network(next(tmp_path.glob("runs/*/weights.pt")), row)
        split = data.val._replace(mean=file["mean"], std=file["std"])
        found = common.report(net.fc(common.features(net, split)), data.val.labels, data.counts)["all"]
        assert row == "stage 1" or found == pytest.approx(run["metrics"][row]["val"], abs=0.6)  # rounding may turn one of 200
    net, _ = common.load_network(next(tmp_path.glob("runs/*/weights.pt")), "stage 1")
    vanilla = common.report(net.fc(common.features(net, split)), data.val.labels, data.counts)["all"]
    assert run["metrics"]["la"]["val"] >= vanilla and run["metrics"]["tau-norm"]["val"] >= vanilla  # tau = 0 is among theirs
    strengths = {row["row"]: row["strength"] for row in run["rows"]}
    assert {row for row, tau in strengths.items() if tau is not None} == {"tau-norm", "la"}


def test_table_1_needs_a_network_that_has_not_seen_the_validation_images(call, refused, tmp_path, wd):
    refused("lort", "--retrain", "all", "--stage1", wd, "--val-per-class", "30", words=["--val-per-class"])
    assert call("lwr", *TINY) == 0
    stage1, = tmp_path.glob("runs/*/weights.pt")
    refused("lort", "--retrain", "all", "--stage1", stage1, words=["--val-per-class"], out=tmp_path / "new")


def test_wb_goes_on_from_wd(call, refused, tmp_path, wd):
    assert call("ewb_fdr", *TINY, "--variant", "wb") == 0
    assert call("ewb_fdr", *TINY, "--variant", "wb", "--stage1", wd, out=tmp_path / "shared") == 0
    # stage 2 shuffles on from stage 1's random numbers when one process does both, and afresh otherwise
    stage1, trained, shared = common.load(wd)["net"], saved(tmp_path / "runs")["net"], saved(tmp_path / "shared")["net"]
    fixed = [name for name in stage1 if not re.search("fc|running|tracked", name)]
    assert all(torch.equal(stage1[name], net[name]) for name in fixed for net in (trained, shared))
    delta = common.max_norm_threshold(stage1["fc.weight"])
    assert max(net["fc.weight"].norm(dim=1).max() for net in (trained, shared)) <= delta + 1e-6
    assert result(tmp_path / "shared")["metrics"]["stage 1 was trained with"]["precision"] == "fp32"
    refused("ewb_fdr", "--epochs", "3", "--variant", "wb", "--stage1", wd, out=tmp_path / "x", words=["--epochs 2"])
    refused("ewb_fdr", *TINY, "--variant", "wb", out=tmp_path / "shared", words=["another --stage1"])


# ---- finished, interrupted, foreign

def test_a_finished_run_is_not_run_again_and_other_flags_are_refused(call, refused, tmp_path, capsys):
    assert call("hinge_ce", *TINY) == 0
    path, = tmp_path.glob("runs/*/result.json")
    first, when = path.read_text(), path.stat().st_mtime_ns
    assert call("hinge_ce", *TINY) == 0 and path.stat().st_mtime_ns == when
    assert "is finished" in capsys.readouterr().out
    refused("hinge_ce", "--epochs", "3", words=["--epochs 2", "3", "delete the folder"])
    refused("hinge_ce", *TINY, "--tau-plus", "0.5", words=["--tau-plus"])
    assert path.read_text() == first


@pytest.fixture
def interrupted(call, tmp_path, monkeypatch, capsys):
    """A hinge_ce run of 3 epochs that was stopped in its second; returns its checkpoint."""
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        real = common.Run.log

        def log(run, losses):
            real(run, losses)
            if run.epoch == 1:
                raise KeyboardInterrupt
        patch.setattr(common.Run, "log", log)
        assert call("hinge_ce", "--epochs", "3") == 130
    checkpoint, = (tmp_path / "runs").glob("*/*.ckpt")
    capsys.readouterr()
    return checkpoint


def test_a_damaged_or_foreign_checkpoint_is_refused(refused, interrupted, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)
    whole, state = interrupted.read_bytes(), common.load(interrupted)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:len(whole) // 2], flipped, b"hello", b"",
                    {"fc.weight": torch.zeros(3)},
                    state | {"flags": state["flags"] | {"lr": 0.3}},
                    state | {"net": {"name.of.another.version": torch.zeros(3)}},
                    {"net": Bomb()}):
        if isinstance(content, dict):
            torch.save(content, interrupted)
        else:
            interrupted.write_bytes(content)
        refused("hinge_ce", "--epochs", "3", words=["ckpt", "delete"])
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("part", ["train", "test"])
def test_changed_data_are_not_mixed_into_a_run(refused, interrupted, monkeypatch, part):
    parts, classes = common.synthetic()
    parts[part] = 255 - parts[part][0], parts[part][1]
    monkeypatch.setattr(common, "synthetic", lambda: (parts, classes))
    refused("hinge_ce", "--epochs", "3", words=["other images"])


STOPS = [("rbl", (), "train", 1), ("hinge_ce", (), "train", 1),
         ("lwr", ("--base", "ce-drw"), "train", 1),  # the epoch in which its weights begin
         ("lort", ("--epochs2", "4"), "stage2", 2), ("ewb_fdr", ("--variant", "wb", "--epochs2", "4"), "stage2", 2),
         ("lort", ("--retrain", "all"), "re-sampling", 2)]


@pytest.mark.parametrize("script, flags, stage, epoch", STOPS)
def test_a_stopped_run_goes_on_to_the_same_result(call, tmp_path, monkeypatch, capsys, script, flags, stage, epoch):
    """In stage 2 from the checkpoints of both stages: that of the first must not have moved on with the weights."""
    monkeypatch.setattr(importlib.import_module("lort"), "TRAINED", ("cosine", "re-sampling", "max-norm", "lort"))
    flags = (*TINY, "--eval-every", "1", *flags)
    assert call(script, *flags, out=tmp_path / "whole") == 0
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    real = common.Run.log

    def log(run, losses, **extra):
        real(run, losses, **extra)
        if (run.stage, run.epoch) == (stage, epoch):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", log)
        assert call(script, *flags) == 130
    capsys.readouterr()
    assert call(script, *flags) == 0
    assert f"{stage}: resumed after epoch {epoch} of" in capsys.readouterr().out
    a, b = result(tmp_path / "runs"), result(tmp_path / "whole")
    assert a["rows"] == b["rows"] and a["metrics"] == b["metrics"]
    assert same(saved(tmp_path / "runs")["net"], saved(tmp_path / "whole")["net"])
    losses = [[line["loss"] for line in log_of(tmp_path / out)] for out in ("runs", "whole")]
    assert losses[0] == losses[1]


KILLER = """
import os, random, shutil, signal, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/methods"]
import torch, torchvision, common, {script}
torch.set_num_threads(1)
common.SAVE_EVERY = 0.0
argv = {argv!r}
random.seed(0)
def child():
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        common.guard(lambda: {script}.main(argv))
        os._exit(0)
    return pid
kills, longest, resumed = 0, {longest}, 0
while kills < {kills}:
    pid = child()
    time.sleep(random.uniform(0.02, longest))
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:  # before the kill: start over
        assert status == 0
        shutil.rmtree({out!r})
        continue
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
    resumed += any(name.endswith(".ckpt") for _, _, names in os.walk({out!r}) for name in names)
began = time.monotonic()
assert os.waitpid(child(), 0)[1] == 0
print(kills, resumed, time.monotonic() - began)
"""


@pytest.mark.parametrize("script, kills", [("lort", 3), ("ewb_fdr", 3)])
def test_killed_at_random_moments_it_ends_with_the_same_result(tmp_path, script, kills):
    """SIGKILL at 6 moments in all: at the start, in both stages, while saving; then the run is completed."""
    flags = ["--dataset", "synthetic", "--device", "cpu", "--epochs", "4", "--epochs2", "3"]
    flags += ["--variant", "wb"] if script == "ewb_fdr" else []
    longest = None
    for out, number in (("whole", 0), ("killed", kills)):
        code = KILLER.format(root=str(ROOT), script=script, argv=[*flags, "--out", str(tmp_path / out)], kills=number,
                             longest=longest, out=str(tmp_path / out))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        killed, resumed, longest = map(float, done.stdout.split())  # kills come within the time of a whole run
    assert killed == kills and resumed >= 1  # a kill left something to resume
    a, b = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert a["rows"] == b["rows"] and a["metrics"] == b["metrics"]
    assert same(saved(tmp_path / "whole")["net"], saved(tmp_path / "killed")["net"])


# ---- side by side, out of room, out of memory

def start(*flags, out, **kwargs):
    command = [sys.executable, ROOT / "methods" / "hinge_ce.py", "--dataset", "synthetic", "--device", "cpu", "--out", out]
    return subprocess.Popen([*map(str, command), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_runs_started_at_once_lose_nothing(tmp_path):
    processes = [start("--epochs", "1", "--seed", seed, out=tmp_path) for seed in ("0", "1", "1")]
    ends = [process.communicate(timeout=200) + (process.returncode,) for process in processes]
    assert ends[0][2] == 0
    assert sorted(end[2] for end in ends[1:]) in ([0, 0], [0, 2])  # the twin is refused, or finds it finished
    assert all("in use by another process" in end[1] for end in ends if end[2] == 2)
    assert sorted(run["seed"] for run in results(tmp_path).values()) == [0, 1]


def test_a_full_disk_ends_with_one_line_and_the_run_goes_on_later(call, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))  # no file may grow beyond this
    process = start("--epochs", "1", out=tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1 and "intact" in err, err
    assert not results(tmp_path) and not list(tmp_path.glob("*/.*.tmp"))
    assert call("hinge_ce", "--epochs", "1", out=tmp_path) == 0 and len(results(tmp_path)) == 1


def test_a_folder_that_vanishes_ends_with_one_line(call, tmp_path, monkeypatch, capsys):
    real = common.Run.log

    def log(run, losses):
        real(run, losses)
        shutil.rmtree(run.folder)
    monkeypatch.setattr(common.Run, "log", log)
    assert call("hinge_ce", *TINY) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_ctrl_c_ends_with_one_line(tmp_path):
    process = start("--epochs", "300", out=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if "arithmetic" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1] == "error: stopped: the same command goes on from the last saved epoch", err


accelerator_error = getattr(torch, "AcceleratorError", RuntimeError)  # newer torch has it
MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), accelerator_error("CUDA error: out of memory"),
          RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]


@pytest.mark.parametrize("error", MEMORY)
def test_out_of_memory_names_the_flag(call, monkeypatch, capsys, error):
    monkeypatch.setattr(common, "batches", lambda *_: (_ for _ in ()).throw(error))
    assert call("hinge_ce", *TINY) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run(call, capsys):
    assert call("hinge_ce", "--variant", "ce", "--lr", "1e6", *TINY) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and "epoch 1" in err and "--lr" in err


def test_logits_that_are_no_numbers_are_not_recorded(call, capsys, tmp_path):
    assert call("hinge_ce", "--epochs", "1", "--batch-size", "5000", "--lr", "9e11") == 2
    assert "not finite" in capsys.readouterr().err and not results(tmp_path / "runs")


def test_a_cpu_says_how_long_it_will_take(call, monkeypatch, capsys):
    monkeypatch.setattr(common.Run, "_save", interrupt)
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    assert call("hinge_ce", "--epochs", "100000") == 130
    assert "hours" in capsys.readouterr().out


# ---- run_all.sh

def run_all(*words, **environment):
    return subprocess.run(["bash", "run_all.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | environment)


WRONG = [{"JOBS": "0"}, {"JOBS": "abc"}, {"SEEDS": " "}, {"SEEDS": "00"}, {"IMB": "1e2"}, {"METHODS": "rbl vit"},
         {"METHODS": ""}, {"METHODS": "../common"}, {"FLAGS": "--seed 5"}, {"OUT": "/dev/null/x"}, {"OUT": "my runs"},
         {"IMB": "natural"}, {"IMB": "0"}]


@pytest.mark.parametrize("words, environment", [(["imagenet"], {}), (["cifar10", "x"], {})] + [([], e) for e in WRONG])
def test_run_all_refuses(words, environment):
    done = run_all(*words, **environment)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


FAKE_PYTHON = """#!{python}
import hashlib, json, os, sys, time
args = sys.argv[1:]
if args[0] == "common.py":
    os.execv({python!r}, [{python!r}] + args)
flags = dict(zip(args[1::2], args[2::2]))
name = args[0].split("/")[1][:-3] + "-" + flags.get("--variant", flags.get("--base", flags.get("--head", "")))
with open(os.environ["TRACE"], "a") as file:
    file.write(" ".join(args) + "\\n")
time.sleep(float(os.environ.get("SLEEP", 0)))
if name == os.environ.get("BREAK"):
    sys.exit("error: broken on purpose")
if "--stage1" in flags and not os.path.exists(flags["--stage1"]):
    sys.exit("error: no stage 1")
if name == "ewb_fdr-wd":
    time.sleep(0.3)
    folder = f"{{flags['--out']}}/ewb_fdr-wd-{{flags['--dataset']}}-if{{flags['--imb-factor']}}-seed{{flags['--seed']}}"
    os.makedirs(folder, exist_ok=True)
    open(folder + "/weights.pt", "w").close()
score = {{"all": 1.0, "many": 1.0, "medium": 1.0, "few": 1.0}}
row = {{"row": name, "acc": score, "acc_flip": score, "best_test": None, "paper": None}}
folder = flags["--out"] + "/" + hashlib.md5(" ".join(args).encode()).hexdigest()
os.makedirs(folder, exist_ok=True)
with open(folder + "/result.json", "w") as file:
    json.dump({{"method": name, "dataset": flags["--dataset"], "imb_factor": 1.0, "seed": int(flags["--seed"]), "flags": {{}},
               "rows": [row], "seconds": 1.0, "command": " ".join(args), "subset": {{}}, "device": "none"}}, file)
"""


@pytest.fixture
def fake(tmp_path):
    """The environment in which run_all.sh meets a `python` that only notes in tmp_path/trace what it was asked to do."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
    (tmp_path / "bin" / "python").chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "TRACE": str(tmp_path / "trace")}


RUN_ALL = 23  # runs of run_all.sh, a seed and imbalance factor


def test_run_all_makes_every_run_and_goes_on_after_a_failure(fake, tmp_path):
    trace = tmp_path / "trace"
    environment = fake | {"JOBS": "3", "SEEDS": "0\n1", "IMB": "100 50"}
    done = run_all("cifar100", BREAK="rbl-fixed", **environment)
    assert done.returncode == 1 and done.stderr.count("rbl.py --head fixed") == 4 and "broken on purpose" in done.stderr
    assert len(trace.read_text().splitlines()) == 4 * RUN_ALL and done.stdout.count("finished:") == 4 * (RUN_ALL - 1)
    assert trace.read_text().count("--retrain all") == 4
    assert "| rbl-rbl |" in done.stdout
    done = run_all("cifar100", **environment | {"METHODS": "lort\thinge_ce", "SEEDS": "7"})
    assert done.stdout.count("finished:") == 2 * 4 and done.returncode == 0
    trace.unlink()
    done = run_all("one-protocol", **environment | {"SEEDS": "0", "IMB": "100"})
    runs = trace.read_text().splitlines()
    assert done.returncode == 0 and len(runs) == RUN_ALL and sum("--augment crop" in run for run in runs) == 3
    protocol = "--backbone resnet34 --epochs 200 --batch-size 128 --val-per-class 20 --dataset cifar100"
    assert all(protocol in run for run in runs)
    done = run_all("cifar10", **environment | {"SEEDS": "0"})
    assert done.stdout.count("finished:") == 2 * RUN_ALL - 1  # no cones at imbalance factor 50


@pytest.mark.parametrize("words", ["cifar100", "one-protocol"])
def test_no_run_of_run_all_is_refused(fake, tmp_path, monkeypatch, words):
    """Every command up to its training, with 100 classes of one grey image in place of CIFAR."""
    class Begins(Exception):
        pass

    def begin(run, *_):
        raise Begins(run.args.published)

    def data(args, device):
        labels = torch.arange(100)
        grey = torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8)
        split = common.Split(grey, labels, torch.zeros(3), torch.ones(3))
        return common.Data(split, split if args.val_per_class else None, split, [1] * len(labels), [], {})
    monkeypatch.setattr(common, "load_data", data)
    stage1 = {"variant": "wd", "val_per_class": 20, "epochs": 200, "batch_size": 64, "lr": 0.01, "weight_decay": 5e-3}
    monkeypatch.setattr(common, "load_stage1", lambda args, data, **others: (torch.nn.Linear(1, 1), data, stage1))
    monkeypatch.setattr(common.Run, "begin", begin)
    run_all(words, **fake, SEEDS="0")
    for number, line in enumerate((tmp_path / "trace").read_text().splitlines()):
        script, *flags = line.split()
        with pytest.raises(Begins):
            importlib.import_module(Path(script).stem).main([*flags, "--out", str(tmp_path / str(number))])
    assert number + 1 == RUN_ALL
    for changes, published in (({}, True), ({"epochs": 40}, False), ({"variant": "ce"}, False)):  # is stage 1 the paper's?
        monkeypatch.setattr(common, "load_stage1", lambda args, data, **others: (torch.nn.Linear(1, 1), data, stage1 | changes))
        with pytest.raises(Begins) as begun:
            importlib.import_module("lort").main(["--stage1", __file__, "--out", str(tmp_path / "lort")])
        assert begun.value.args == (published,)


def test_a_stopped_run_all_leaves_no_run_behind(fake, tmp_path):
    trace = tmp_path / "trace"
    process = subprocess.Popen(["bash", "run_all.sh", "cifar100"], cwd=ROOT, env=os.environ | fake | {"JOBS": "2", "SLEEP": "1"},
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not trace.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) != 0
    time.sleep(2.5)
    assert len(trace.read_text().splitlines()) <= 2 and not list((tmp_path / "out").glob("cifar100/*/result.json"))
