"""Whole runs: repeatable, resumable, honest about the test set; results are neither lost nor mixed."""
import importlib
import io
import json
import os
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
from conftest import ROOT, SCRIPTS, result, results, same, saved

TINY = ("--epochs", "2", "--imb-factor", "100")
VARIANTS = ("ce", "cb", "wd", "wb", "etf", "fr-etf")
MODES = {"ewb_fdr": [("--variant", v) for v in VARIANTS] + [("--variant", "wb", "--cb-loss", "ce")],
         "hinge_ce": [("--variant", v) for v in ("ce", "ce-etf", "hinge")] + [("--tau-minus", "0.9")],
         "lort": [(), ("--bn", "eval"), ("--retrain", "all")],
         "lwr": [("--base", b) for b in ("bs", "ce-drw", "focal", "la")] + [("--project", "no", "--schedule", "const")],
         "rbl": [("--head", h) for h in ("rbl", "fixed", "linear")] + [("--augment", "strong", "--deterministic")]}


RUNS = [(script, ()) for script in SCRIPTS] + [("lort", ("--retrain", "all"))]


def interrupt(*_, **__):
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("script, mode", [(script, mode) for script in SCRIPTS for mode in MODES[script]])
def test_every_mode_runs_without_a_warning(call, tmp_path, capsys, recwarn, script, mode):
    assert call(script, *TINY, *mode) == 0
    out, runs = capsys.readouterr().out, tmp_path / "runs"
    run, folder = result(runs), next(runs.glob("*/"))
    assert run["method"] == script and run["subset"]["sha256"] in out and "| many / medium / few |" in out
    kept = saved(runs, "test_logits.pt")
    assert set(kept) == {"logits", "labels", "counts", "classes", "rows", "strengths"}
    assert kept["logits"].shape == (340, 20) and len(kept["classes"]) == 20 and run["headline"] in kept["rows"]
    for row in run["rows"]:  # every number of the table can be computed from the file
        assert row["acc"] == common.report(kept["rows"][row["row"]], kept["labels"], kept["counts"])
        assert all(0 <= row[kind][group] <= 100 for kind in ("acc", "acc_flip") for group in ("all", "many", "few"))
        assert kept["strengths"][row["row"]] == row["strength"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = [line["loss"] for line in log if line["stage"] == log[0]["stage"]]
    other_loss = "--tau-minus" in mode or "ce-drw" in mode  # of the last epoch, or a loss that is hard to lower
    assert (first[-1] < first[0] or other_loss) and not list(folder.glob("*.ckpt"))
    assert not [str(w.message) for w in recwarn]


@pytest.mark.parametrize("script, mode", RUNS)
def test_a_trained_network_is_for_use(call, tmp_path, script, mode):
    """load_network() gives the logits of every row, whatever the script made of the classifier."""
    assert call(script, *TINY, *mode) == 0
    weights, = tmp_path.glob("runs/*/weights.pt")
    kept = saved(tmp_path / "runs", "test_logits.pt")
    data = common.load_data(common.base_parser("").parse_args(["--dataset", "synthetic"]), torch.device("cpu"))
    rows = saved(tmp_path / "runs")["rows"]  # without lort's "stage 1", which is another network
    assert result(tmp_path / "runs")["headline"] in rows
    for row, logits in {None: kept["logits"], **{row: kept["rows"][row] for row in rows}}.items():
        net, file = common.load_network(weights, row)
        split = data.test._replace(mean=file["mean"], std=file["std"])
        assert torch.allclose(net.fc(common.features(net, split)), logits, atol=1e-4, rtol=1e-4)


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
    real, run, net, losses = common.load_data, {}, {}, {}
    for change in ("nothing", "test", "val"):
        def load(args, device):
            data = real(args, device)
            if change == "nothing":
                return data
            part = getattr(data, change)
            return data._replace(**{change: part._replace(images=255 - part.images, labels=part.labels.flip(0))})
        monkeypatch.setattr(common, "load_data", load)
        assert call(script, *flags, out=tmp_path / change) == 0
        run[change], net[change] = result(tmp_path / change), saved(tmp_path / change)["net"]
        log = (next((tmp_path / change).glob("*/log.jsonl"))).read_text().splitlines()
        losses[change] = [json.loads(line)["loss"] for line in log]
    assert same(net["nothing"], net["test"]) and losses["nothing"] == losses["test"] == losses["val"]
    assert run["nothing"]["rows"][0]["acc"] != run["test"]["rows"][0]["acc"]
    if mode:
        chosen = [{row["row"]: run[change]["metrics"].get(row["row"]) for row in run[change]["rows"]} for change in run]
        assert chosen[0] == chosen[1] != chosen[2] and run["nothing"]["rows"][0] == run["val"]["rows"][0]
        net = {change: {name: value for name, value in net[change].items() if not name.startswith("fc.")} for change in net}
    assert same(net["nothing"], net["val"])
    if script == "ewb_fdr":
        strengths = {change: [row["strength"] for row in run[change]["rows"]] for change in run}
        assert strengths["nothing"] == strengths["test"]
    else:  # by which flags may be chosen
        val = [run[change]["metrics"]["val"] for change in ("nothing", "test", "val")]
        assert val[0] == val[1] != val[2] and 0 < val[0]["all"] < 100 and val[0]["few"] is not None


def test_the_network_of_la_is_scored_without_the_adjustment_too(call, tmp_path):
    assert call("lwr", *TINY, "--base", "la", "--strength", "0") == 0
    plain, adjusted = result(tmp_path / "runs")["rows"]
    kept = saved(tmp_path / "runs", "test_logits.pt")
    assert (plain["row"], adjusted["row"], adjusted["strength"]) == ("ce", "la", 1.0)
    assert plain["acc"] == common.report(kept["logits"], kept["labels"], kept["counts"]) != adjusted["acc"]
    shifted = kept["logits"] - kept["counts"].log()
    assert adjusted["acc"] == common.report(shifted, kept["labels"], kept["counts"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_near_fp32_and_keeps_the_weights_in_fp32(call, tmp_path, script):
    for precision in ("fp32", "bf16"):
        assert call(script, *TINY, "--precision", precision, out=tmp_path / precision) == 0
    a, b = (result(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert (a["precision"], b["precision"]) == ("fp32", "bf16")
    assert abs(a["rows"][-1]["acc"]["all"] - b["rows"][-1]["acc"]["all"]) < 15
    net = saved(tmp_path / "bf16")["net"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in net.values())
    assert not same(saved(tmp_path / "fp32")["net"], net)


def test_strength_zero_and_theta_one_are_the_base(call, tmp_path):
    modes = {"base": ("--strength", 0), "gated": ("--theta", 1), "lwr": ("--theta", 0.0, "--strength", 5)}
    for name, flags in modes.items():
        assert call("lwr", *TINY, *flags, out=tmp_path / name) == 0
    base, gated, lwr = (saved(tmp_path / name)["net"] for name in modes)
    assert same(base, gated) and not same(base, lwr)


def test_the_ramp_of_lwr_begins_at_zero(call, tmp_path):
    nets = {}
    for name, flags in {"base": ("--strength", "0"), "ramp": ("--theta", "-1"), "const": ("--theta", "-1", "--schedule", "const")}.items():
        assert call("lwr", "--epochs", "1", *flags, out=tmp_path / name) == 0
        nets[name] = saved(tmp_path / name)["net"]
    assert same(nets["base"], nets["ramp"]) and not same(nets["base"], nets["const"])
    assert call("lwr", "--epochs", "2", "--theta", "-1", out=tmp_path / "ramp 2") == 0
    assert call("lwr", "--epochs", "2", "--strength", "0", out=tmp_path / "base 2") == 0
    assert not same(saved(tmp_path / "base 2")["net"], saved(tmp_path / "ramp 2")["net"])


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
    log = next(tmp_path.glob("runs/*/log.jsonl")).read_text().splitlines()
    accuracy, loss = json.loads(log[-1])["test_acc_ce"]
    assert accuracy == pytest.approx(result(tmp_path / "runs")["rows"][1]["acc"]["all"])  # the test set is balanced
    assert loss == pytest.approx(F.cross_entropy(kept["rows"]["rbl"], kept["labels"]).item())
    assert all("train_acc_ce" in line for line in log)


# ---- stage 1 from a file

def test_stage_one_of_other_data_is_refused(call, refused, tmp_path, monkeypatch):
    assert call("lort", "--epochs", "1", "--imb-factor", "10") == 0
    stage1, = tmp_path.glob("runs/*/stage1.pt")
    refused("lort", "--imb-factor", "100", "--stage1", stage1, words=["--imb-factor 10"])
    refused("lort", "--imb-factor", "10", "--val-per-class", "10", "--stage1", stage1, out=tmp_path / "val",
            words=["--val-per-class"])  # it was trained on these
    parts, classes = common.synthetic()
    parts["test"] = 255 - parts["test"][0], parts["test"][1]
    monkeypatch.setattr(common, "synthetic", lambda: (parts, classes))
    refused("lort", "--imb-factor", "10", "--stage1", stage1, out=tmp_path / "other", words=["other images"])


def test_stage_one_may_not_be_exchanged_in_between(call, refused, tmp_path, monkeypatch, capsys):
    for seed in ("0", "1"):
        assert call("lort", *TINY, "--epochs2", "1", "--seed", seed) == 0
    own, other = (next(tmp_path.glob(f"runs/*seed{seed}/stage1.pt")) for seed in (0, 1))
    stage1 = tmp_path / "stage1.pt"
    shutil.copy(own, stage1)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish", interrupt)
        assert call("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "new") == 130
    capsys.readouterr()
    shutil.copy(other, stage1)
    refused("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "new", words=["stage1-sha256"])


def test_a_run_may_be_stopped_and_go_on_in_a_notebook(call, monkeypatch, tmp_path):
    """In one process, with a stdout that is no file."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish", interrupt)
        assert call("lwr", *TINY) == 130
    assert call("lwr", *TINY) == 0
    assert "resumed after epoch 2" in sys.stdout.getvalue()


def test_finished_runs_may_be_moved_with_their_stage_one(call, tmp_path):
    flags = (*TINY, "--epochs2", "1")
    assert call("lort", *flags, out=tmp_path / "here") == 0
    flags = ("--imb-factor", "100", "--epochs2", "1", "--stage1")
    (tmp_path / "here").rename(tmp_path / "there")
    stage1, = tmp_path.glob("there/*/stage1.pt")
    assert call("lort", *flags, stage1, out=tmp_path / "new") == 0
    done = next(tmp_path.glob("new/*/result.json")).stat().st_mtime_ns
    moved = stage1.rename(tmp_path / "moved.pt")
    assert call("lort", *flags, moved, out=tmp_path / "new") == 0
    assert next(tmp_path.glob("new/*/result.json")).stat().st_mtime_ns == done


@pytest.mark.parametrize("seed", ["1", "2"])
def test_stage_one_is_handed_over_with_its_normalisation(call, tmp_path, seed):
    """wd holds images out, lort does not: their training images, and so their means, differ."""
    assert call("ewb_fdr", *TINY, "--variant", "wd", "--seed", seed) == 0
    stage1, = tmp_path.glob("runs/*/weights.pt")
    assert call("lort", "--imb-factor", "100", "--stage1", stage1, "--seed", seed, out=tmp_path / "lort") == 0
    wd, lort = result(tmp_path / "runs"), result(tmp_path / "lort")
    assert lort["rows"][0]["acc"] == wd["rows"][0]["acc"] and lort["rows"][0]["acc_flip"] == wd["rows"][0]["acc_flip"]
    assert torch.equal(saved(tmp_path / "lort")["mean"], saved(tmp_path / "runs")["mean"])
    assert lort["metrics"]["stage 1 was trained with"]["val_per_class"] == 10
    plain = common.load_data(common.base_parser("").parse_args(["--dataset", "synthetic"]), torch.device("cpu"))
    assert not torch.equal(saved(tmp_path / "lort")["mean"], plain.test.mean)


def test_lort_does_not_retrain_a_retrained_classifier(call, refused, tmp_path):
    assert call("lort", *TINY) == 0 and call("ewb_fdr", *TINY, "--variant", "wb") == 0
    for script in ("lort", "ewb_fdr"):
        stage1, = tmp_path.glob(f"runs/{script}-*/weights.pt")
        refused("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "x", words=["a retrained classifier", "stage1.pt"])


def test_stage_one_was_trained_as_is_asked_for(call, refused, tmp_path):
    assert call("lwr", *TINY) == 0
    stage1, = tmp_path.glob("runs/*/weights.pt")
    refused("lort", "--stage1", stage1, "--epochs", "77", out=tmp_path / "x", words=["--epochs 2, not 77"])
    refused("lort", "--stage1", stage1, "--weight-decay", "0.5", out=tmp_path / "x", words=["--weight-decay 0.0005, not 0.5"])
    assert call("lort", "--stage1", stage1, "--epochs", "2", "--epochs2", "1", out=tmp_path / "lort") == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_lort_goes_on_from_the_network_of_any_script(call, tmp_path, script):
    """Its first row is that network; each of the others starts there."""
    assert call(script, *TINY, "--val-per-class", "10") == 0
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
    counts, tau = torch.tensor(saved(tmp_path / "lort")["counts"]), run["metrics"]["la"]["s"]
    assert torch.allclose(rows["la"]["bias"], b - tau * counts.log(), atol=1e-4)
    assert (rows["cosine"]["bias"] == 0).all()
    assert same({"weight": saved(tmp_path / "lort")["net"]["fc.weight"]}, {"weight": rows["lort"]["weight"]})


def test_table_1_chooses_on_validation_images(call, tmp_path):
    """Every choice has the recorded accuracy on them, and none of the row's other classifiers has more."""
    assert call("lort", "--retrain", "all") == 0
    run, kept = result(tmp_path / "runs"), saved(tmp_path / "runs")
    data = common.load_data(common.base_parser("").parse_args(["--dataset", "synthetic", "--val-per-class", "10"]), torch.device("cpu"))
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


def test_table_1_goes_on_after_a_kill(call, tmp_path, monkeypatch):
    """Stopped in the second of four methods, of which the first was done and the second saved once."""
    monkeypatch.setattr(importlib.import_module("lort"), "TRAINED", ("cosine", "re-sampling", "max-norm", "lort"))
    assert call("lort", "--retrain", "all", out=tmp_path / "whole") == 0
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    real = common.Run.log

    def log(run, losses):
        real(run, losses)
        if run.stage == "re-sampling" and run.epoch == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", log)
        assert call("lort", "--retrain", "all") == 130
    assert {path.name for path in tmp_path.glob("runs/*/*.ckpt")} == {"cosine.ckpt", "re-sampling.ckpt"}
    assert call("lort", "--retrain", "all") == 0
    a, b = result(tmp_path / "runs"), result(tmp_path / "whole")
    assert a["rows"] == b["rows"] and a["metrics"] == b["metrics"]
    assert same(saved(tmp_path / "runs")["net"], saved(tmp_path / "whole")["net"])
    log = [next((tmp_path / out).glob("*/log.jsonl")).read_text().splitlines() for out in ("runs", "whole")]
    assert len(log[0]) == len(log[1]) == 20


def test_table_1_needs_a_network_that_has_not_seen_the_validation_images(call, refused, tmp_path, wd):
    refused("lort", "--retrain", "sgd", "--stage1", wd, words=["--retrain", "sgd"])
    refused("lort", "--retrain", "all", "--stage1", wd, "--val-per-class", "20", words=["--val-per-class"])
    assert call("lwr", *TINY) == 0
    stage1, = tmp_path.glob("runs/*/weights.pt")
    refused("lort", "--retrain", "all", "--stage1", stage1, words=["--val-per-class"], out=tmp_path / "new")


def test_wb_goes_on_from_wd(call, refused, tmp_path):
    assert call("ewb_fdr", *TINY, "--variant", "wd") == 0 and call("ewb_fdr", *TINY, "--variant", "wb") == 0
    stage1 = next((tmp_path / "runs").glob("ewb_fdr-wd-*/weights.pt"))
    assert call("ewb_fdr", *TINY, "--variant", "wb", "--stage1", stage1, out=tmp_path / "shared") == 0
    # stage 2 shuffles on from stage 1's random numbers when one process does both, and afresh otherwise
    trained = common.load(next((tmp_path / "runs").glob("ewb_fdr-wb-*/weights.pt")))["net"]
    shared = saved(tmp_path / "shared")["net"]
    assert all(torch.equal(trained[name], shared[name]) for name in trained if "conv" in name)
    assert result(tmp_path / "shared")["metrics"]["stage 1 was trained with"]["precision"] == "fp32"
    refused("ewb_fdr", "--epochs", "3", "--variant", "wb", "--stage1", stage1, out=tmp_path / "x", words=["--epochs 2"])


# ---- finished, interrupted, foreign

def test_a_finished_run_is_not_run_again_and_other_flags_are_refused(call, refused, tmp_path, capsys):
    assert call("hinge_ce", *TINY) == 0
    first = next(tmp_path.glob("runs/*/result.json")).read_text()
    began = time.time()
    assert call("hinge_ce", *TINY) == 0 and time.time() - began < 1
    assert "is finished" in capsys.readouterr().out
    refused("hinge_ce", "--epochs", "3", words=["--epochs 2", "3", "delete the folder"])
    refused("hinge_ce", *TINY, "--tau-plus", "0.5", words=["--tau-plus"])
    assert next(tmp_path.glob("runs/*/result.json")).read_text() == first


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


def test_an_interrupted_run_goes_on_to_the_same_result(call, interrupted, tmp_path, capsys):
    assert common.load(interrupted)["epoch"] == 1
    assert call("hinge_ce", "--epochs", "3") == 0
    assert "resumed after epoch 1 of 3" in capsys.readouterr().out
    assert call("hinge_ce", "--epochs", "3", out=tmp_path / "whole") == 0
    a, b = result(tmp_path / "runs"), result(tmp_path / "whole")
    assert a["rows"] == b["rows"] and same(saved(tmp_path / "runs")["net"], saved(tmp_path / "whole")["net"])


DAMAGES = ("half", "flipped bit", "text", "empty", "foreign", "other flags", "other version")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_is_refused(refused, interrupted, damage):
    data, state = bytearray(interrupted.read_bytes()), common.load(interrupted)
    if damage == "flipped bit":
        data[len(data) // 2] ^= 1
    changed = {"foreign": {"fc.weight": torch.zeros(3)},
               "other flags": state | {"flags": state["flags"] | {"lr": 0.3}},
               "other version": state | {"net": {"old.name": torch.zeros(3)}}}
    if damage in changed:
        torch.save(changed[damage], interrupted)
    else:
        interrupted.write_bytes({"half": data[:len(data) // 2], "text": b"hello", "empty": b""}.get(damage, data))
    refused("hinge_ce", "--epochs", "3", words=["ckpt", "delete"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_changed_data_are_not_mixed_into_a_run(refused, interrupted, monkeypatch, part):
    parts, classes = common.synthetic()
    parts[part] = 255 - parts[part][0], parts[part][1]
    monkeypatch.setattr(common, "synthetic", lambda: (parts, classes))
    refused("hinge_ce", "--epochs", "3", words=["other images"])


def test_a_malicious_checkpoint_is_not_executed(refused, interrupted, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)
    torch.save({"net": Bomb()}, interrupted)
    refused("hinge_ce", "--epochs", "3")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("script", ["lort", "ewb_fdr"])
def test_a_kill_in_stage_two_leaves_stage_one_as_it_was(call, tmp_path, monkeypatch, script):
    """After stage 2 was saved once: stage 1's checkpoint must not have moved on with the live weights."""
    flags = (*TINY, "--epochs2", "4", *(("--variant", "wb") if script == "ewb_fdr" else ()))
    assert call(script, *flags, out=tmp_path / "whole") == 0
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    real = common.Run.log

    def log(run, losses):
        real(run, losses)
        if run.stage == "stage2" and run.epoch == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", log)
        assert call(script, *flags) == 130
    assert {path.name for path in tmp_path.glob("runs/*/*.ckpt")} == {"stage1.ckpt", "stage2.ckpt"}
    assert call(script, *flags) == 0
    a, b = result(tmp_path / "runs"), result(tmp_path / "whole")
    assert a["rows"] == b["rows"] and a["metrics"] == b["metrics"]
    assert same(saved(tmp_path / "runs")["net"], saved(tmp_path / "whole")["net"])


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
    if os.waitpid(pid, os.WNOHANG)[0]:
        shutil.rmtree({out!r})  # it was done before the kill: start over
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
    assert killed == kills and resumed >= kills // 4  # most kills left something to resume
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
    monkeypatch.setattr(common, "features", lambda *_: (_ for _ in ()).throw(error))
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

    def begin(*_, **__):
        raise Begins

    def data(args, device):
        labels = torch.arange(100)
        grey = torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8)
        split = common.Split(grey, labels, torch.zeros(3), torch.ones(3))
        return common.Data(split, split if args.val_per_class else None, split, [1] * len(labels), [], {})
    monkeypatch.setattr(common, "load_data", data)
    stage1 = {"val_per_class": 20, "epochs": 200, "batch_size": 64, "lr": 0.01, "weight_decay": 5e-3}
    monkeypatch.setattr(common, "load_stage1", lambda args, data, **others: (torch.nn.Linear(1, 1), data, stage1))
    monkeypatch.setattr(common.Run, "begin", begin)
    run_all(words, **fake, SEEDS="0")
    for number, line in enumerate((tmp_path / "trace").read_text().splitlines()):
        script, *flags = line.split()
        with pytest.raises(Begins):
            importlib.import_module(Path(script).stem).main([*flags, "--out", str(tmp_path / str(number))])
    assert number + 1 == RUN_ALL


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
