"""Whole runs: repeatable, resumable, honest about the test set; results are neither lost nor mixed."""
import importlib
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

import common
from conftest import ROOT, SCRIPTS

TINY = ("--epochs", "2", "--imb-factor", "100")
MODES = {"ewb_fdr": [("--variant", v) for v in ("ce", "cb", "wd", "wb", "etf", "fr-etf")] + [("--variant", "wb", "--cb-loss", "ce")],
         "hinge_ce": [("--variant", v) for v in ("ce", "ce-etf", "hinge")] + [("--tau-minus", "theta", "--momentum", "0")],
         "lort": [(), ("--bn", "eval")],
         "lwr": [("--base", b) for b in ("bs", "ce-drw", "focal", "la")] + [("--project", "no", "--schedule", "const")],
         "rbl": [("--head", h) for h in ("rbl", "fixed", "linear")] + [("--augment", "strong", "--deterministic")]}


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def weights(folder):
    path, = folder.glob("*/weights.pt")
    return common.load(path)["net"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_script_is_listed():
    assert sorted(MODES) == SCRIPTS


@pytest.mark.parametrize("script, mode", [(script, mode) for script in SCRIPTS for mode in MODES[script]])
def test_every_mode_runs_without_a_warning(call, tmp_path, capsys, recwarn, script, mode):
    assert call(script, *TINY, *mode) == 0
    out = capsys.readouterr().out
    result, = lines(tmp_path / "runs")
    assert result["method"] == script and result["subset"]["sha256"] in out and "| all | many | medium | few |" in out
    assert all(0 <= row[kind][group] <= 100 for row in result["rows"] for kind in ("acc", "acc_flip") for group in ("all", "many", "few"))
    folder = next((tmp_path / "runs").glob("*/"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = [h["loss"] for h in log if h["stage"] == log[0]["stage"]]
    assert (first[-1] < first[0] or "theta" in mode) and not list(folder.glob("*.ckpt"))
    saved = common.load(folder / "test_logits.pt")
    logits = {k: v for k, v in saved.items() if k not in ("labels", "counts")}
    assert all(v.shape == (1000, 20) for v in logits.values())
    headline = list(logits.values())[-1] if script != "ewb_fdr" else logits[result["row"]]
    if script != "rbl" and "la" not in mode:  # these keep the logits before the adjustment
        counts = common.load_data(common_arguments(result["flags"]), torch.device("cpu")).counts
        assert common.report(headline, saved["labels"], counts) == result["acc"]
    assert not [str(w.message) for w in recwarn]


def common_arguments(flags):
    return __import__("types").SimpleNamespace(**flags, data_root=None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_command_gives_the_same_numbers(call, tmp_path, script):
    for out in ("a", "b"):
        assert call(script, *TINY, out=tmp_path / out) == 0
    a, b = (lines(tmp_path / out)[0] for out in ("a", "b"))
    assert a["rows"] == b["rows"] and a["metrics"] == b["metrics"] and same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert call(script, *TINY, "--seed", "1", out=tmp_path / "c") == 0
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_neither_test_nor_validation_images_reach_the_weights(call, tmp_path, monkeypatch, script):
    """With other test images the weights and every choice stay; with other validation images the weights stay."""
    flags = (*TINY, "--eval-every", "1", "--val-per-class", "10")
    real, outcome = common.load_data, {}
    for change in ("nothing", "test", "val"):
        def load(args, device):
            data = real(args, device)
            part = {"test": data.test, "val": data.val}.get(change)
            return data._replace(**{change: part._replace(images=255 - part.images, labels=part.labels.flip(0))}) if part else data
        monkeypatch.setattr(common, "load_data", load)
        assert call(script, *flags, out=tmp_path / change) == 0
        outcome[change] = lines(tmp_path / change)[0], weights(tmp_path / change)
    assert same(outcome["nothing"][1], outcome["test"][1]) and same(outcome["nothing"][1], outcome["val"][1])
    assert outcome["nothing"][0]["acc"] != outcome["test"][0]["acc"]
    if script == "ewb_fdr":
        strengths = [[row["strength"] for row in outcome[change][0]["rows"]] for change in ("nothing", "test")]
        assert strengths[0] == strengths[1]
    else:  # by which flags may be chosen
        val = [outcome[change][0]["metrics"]["val"] for change in ("nothing", "test", "val")]
        assert val[0] == val[1] != val[2] and 0 < val[0]["all"] < 100 and val[0]["few"] is not None


def test_the_network_of_la_is_scored_without_the_adjustment_too(call, tmp_path):
    assert call("lwr", *TINY, "--base", "la", "--strength", "0") == 0
    result, = lines(tmp_path / "runs")
    saved = common.load(next(tmp_path.glob("runs/*/test_logits.pt")))
    plain = common.report(saved["logits"], saved["labels"], saved["counts"].tolist())
    assert [row["row"] for row in result["rows"]] == ["ce", "la"] and result["rows"][0]["acc"] == plain != result["acc"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_near_fp32_and_keeps_the_weights_in_fp32(call, tmp_path, script):
    for precision in ("fp32", "bf16"):
        assert call(script, *TINY, "--precision", precision, out=tmp_path / precision) == 0
    a, b = (lines(tmp_path / precision)[0] for precision in ("fp32", "bf16"))
    assert (a["precision"], b["precision"]) == ("fp32", "bf16") and abs(a["acc"]["all"] - b["acc"]["all"]) < 15
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights(tmp_path / "bf16").values())
    assert not same(weights(tmp_path / "fp32"), weights(tmp_path / "bf16"))


def test_strength_zero_and_theta_one_are_the_base(call, tmp_path):
    for name, flags in {"base": ("--strength", 0), "gated": ("--theta", 1), "lwr": ("--theta", 0.0, "--strength", 5)}.items():
        assert call("lwr", *TINY, *flags, out=tmp_path / name) == 0
    assert same(weights(tmp_path / "base"), weights(tmp_path / "gated"))
    assert not same(weights(tmp_path / "base"), weights(tmp_path / "lwr"))


def test_eval_every_reports_the_best_and_changes_nothing(call, tmp_path):
    assert call("hinge_ce", *TINY, out=tmp_path / "a") == 0
    assert call("hinge_ce", *TINY, "--eval-every", "1", out=tmp_path / "b") == 0
    assert call("hinge_ce", *TINY, "--eval-every", "9", out=tmp_path / "last") == 0
    a, b, last = (lines(tmp_path / name)[0] for name in ("a", "b", "last"))
    assert a["best_test"] is None and last["best_test"] == last["acc"]["all"] and b["best_test"] >= b["acc"]["all"] and a["acc"] == b["acc"]


def test_rbl_keeps_its_curves(call, tmp_path):
    assert call("rbl", *TINY, "--eval-every", "1") == 0
    result, folder = lines(tmp_path / "runs")[0], next(tmp_path.glob("runs/*/"))
    saved, last = common.load(folder / "test_logits.pt"), json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["test_acc"] == pytest.approx(result["acc"]["all"])  # the test set is balanced
    assert last["test_ce"] == pytest.approx(torch.nn.functional.cross_entropy(saved["logits"], saved["labels"]).item())
    assert 0 < last["train_acc"] <= 100 and last["train_ce"] > 0


def test_the_best_on_test_stands_beside_the_row_that_was_tested(call, tmp_path):
    best = {}
    for script, flags in {"lort": ("--epochs2", 1), "ewb_fdr": ("--variant", "wd"), "rbl": ()}.items():
        assert call(script, *TINY, "--eval-every", "1", *flags, out=tmp_path / script) == 0
        best |= {row["row"]: row["best_test"] and row["best_test"] - row["acc"]["all"] for row in lines(tmp_path / script)[0]["rows"]}
    assert best["lort"] == 0 and min(best["stage 1"], best["wd"], best["rbl"]) >= 0  # stage 2 was one epoch: the best is the last
    assert best["wd + additive LA"] is best["wd + multiplicative LA"] is best["rbl, no adjustment"] is None


def test_stage_one_of_other_data_is_refused(call, tmp_path, capsys, monkeypatch):
    assert call("lort", "--epochs", "1", "--imb-factor", "10") == 0
    stage1, = tmp_path.glob("runs/*/stage1.pt")
    capsys.readouterr()
    assert call("lort", "--imb-factor", "100", "--stage1", stage1) == 2
    assert "--imb-factor 10" in capsys.readouterr().err
    assert call("lort", "--imb-factor", "10", "--val-per-class", "10", "--stage1", stage1, out=tmp_path / "val") == 2  # it saw these
    assert "--val-per-class 10" in capsys.readouterr().err
    train, test = common.synthetic()
    monkeypatch.setattr(common, "synthetic", lambda: [train, (255 - test[0], test[1])])
    assert call("lort", "--imb-factor", "10", "--stage1", stage1, out=tmp_path / "other") == 2
    assert "trained on other images" in capsys.readouterr().err


def test_stage_one_is_neither_deleted_nor_exchanged(call, refused, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    for seed in ("0", "1"):
        assert call("lort", *TINY, "--epochs2", "1", "--seed", seed) == 0
    own, other = (next(tmp_path.glob(f"runs/*seed{seed}/stage1.pt")) for seed in (0, 1))
    stage1 = tmp_path / "stage1.pt"
    stage1.write_bytes(own.read_bytes())
    refused("lort", "--imb-factor", "100", "--stage1", own, "--overwrite", words=["would delete"])
    assert own.read_bytes() == stage1.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "new") == 130
    capsys.readouterr()
    stage1.write_bytes(other.read_bytes())
    refused("lort", "--imb-factor", "100", "--stage1", stage1, out=tmp_path / "new", words=["stage1-sha256"])


def test_stage_one_is_shared_where_the_recipe_is_equal(call, tmp_path, capsys):
    assert call("ewb_fdr", *TINY, "--variant", "wd") == 0 and call("ewb_fdr", *TINY, "--variant", "wb") == 0
    stage1 = next((tmp_path / "runs").glob("ewb_fdr-wd-*/weights.pt"))
    shared = tmp_path / "shared"
    assert call("ewb_fdr", *TINY, "--variant", "wb", "--stage1", stage1, out=shared) == 0
    trained = lines(tmp_path / "runs")[1]
    # stage 2 shuffles on from stage 1's random numbers when one process does both, and afresh otherwise
    assert trained["row"] == lines(shared)[0]["row"] == "wb"
    convolutions = [{k: v for k, v in common.load(next(out.glob("ewb_fdr-wb-*/weights.pt")))["net"].items() if "conv" in k}
                    for out in (tmp_path / "runs", shared)]
    assert same(*convolutions) and convolutions[0]
    capsys.readouterr()
    assert call("ewb_fdr", "--epochs", "3", "--variant", "wb", "--stage1", stage1, out=tmp_path / "other") == 2
    assert "--epochs" in capsys.readouterr().err
    assert call("lort", "--imb-factor", "100", "--stage1", stage1, out=shared) == 0
    assert lines(shared)[1]["rows"][0]["acc"] == next(row for row in lines(tmp_path / "runs")[0]["rows"] if row["row"] == "wd")["acc"]


# ---- finished, other flags, foreign files

def test_a_finished_run_is_not_run_again_and_other_flags_are_refused(call, refused, tmp_path, capsys):
    assert call("hinge_ce", *TINY) == 0
    began = time.time()
    assert call("hinge_ce", *TINY) == 0 and time.time() - began < 1
    assert "is finished" in capsys.readouterr().out and len(lines(tmp_path / "runs")) == 1
    assert call("hinge_ce", *TINY) == 0 and len(lines(tmp_path / "runs")) == 1
    refused("hinge_ce", "--epochs", "3", words=["--epochs 2", "3", "--overwrite"])
    refused("hinge_ce", *TINY, "--tau-plus", "0.5", words=["--tau-plus"])
    assert call("hinge_ce", "--epochs", "1", "--overwrite") == 0
    assert [line["flags"]["epochs"] for line in lines(tmp_path / "runs")] == [1]


def test_an_interrupted_second_run_does_not_count_as_finished(call, tmp_path, monkeypatch):
    assert call("hinge_ce", *TINY) == 0 and call("lort", *TINY) == 0
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("hinge_ce", *TINY, "--overwrite") == 130
    assert [line["method"] for line in lines(tmp_path / "runs")] == ["lort"]
    assert call("hinge_ce", *TINY) == 0 and len(lines(tmp_path / "runs")) == 2


def test_a_run_of_which_a_part_is_gone_is_run_again_by_the_same_flags_only(call, refused, tmp_path):
    for part in ("*/weights.pt", "results.jsonl"):
        assert call("hinge_ce", *TINY) == 0
        next(tmp_path.glob(f"runs/{part}")).unlink()
        refused("hinge_ce", *TINY, "--lr", "0.1", words=["--lr 0.2", "--overwrite"])
        assert call("hinge_ce", *TINY) == 0 and len(lines(tmp_path / "runs")) == 1 and weights(tmp_path / "runs")


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_deleted_is_not_recorded(call, tmp_path, monkeypatch, capsys, again):
    real = common.Run.log

    def log(run, losses):
        shutil.rmtree(run.folder)
        if again:
            run.folder.mkdir()  # as another run would
        real(run, losses)
    monkeypatch.setattr(common.Run, "log", log)
    assert call("hinge_ce", *TINY) == 2 and not lines(tmp_path / "runs")
    message, = capsys.readouterr().err.strip().splitlines()
    assert "moved or deleted" in message


def test_results_may_be_a_link(call, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "all.jsonl").write_text("")
    (tmp_path / "runs" / "results.jsonl").symlink_to(tmp_path / "all.jsonl")
    assert call("hinge_ce", "--epochs", "1") == 0
    assert (tmp_path / "runs" / "results.jsonl").is_symlink() and (tmp_path / "all.jsonl").read_text()


@pytest.fixture
def interrupted(call, tmp_path, monkeypatch, capsys):
    """A hinge_ce run of 3 epochs that was stopped after its first; returns its checkpoint."""
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    real = common.Run.log

    def log(run, losses):
        real(run, losses)
        if run.epoch == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "log", log)
    assert call("hinge_ce", "--epochs", "3") == 130
    monkeypatch.setattr(common.Run, "log", real)
    checkpoint, = (tmp_path / "runs").glob("*/*.ckpt")
    capsys.readouterr()
    return checkpoint


def test_an_interrupted_run_goes_on_to_the_same_result(call, interrupted, tmp_path, capsys):
    assert common.load(interrupted)["epoch"] == 1
    assert call("hinge_ce", "--epochs", "3") == 0
    assert call("hinge_ce", "--epochs", "3", out=tmp_path / "whole") == 0
    assert lines(tmp_path / "runs")[0]["acc"] == lines(tmp_path / "whole")[0]["acc"]
    assert same(weights(tmp_path / "runs"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["half", "flipped bit", "text", "empty", "foreign", "other flags", "other version"])
def test_a_damaged_or_foreign_checkpoint_is_refused(refused, interrupted, damage):
    data = interrupted.read_bytes()
    if damage == "flipped bit":
        data = bytearray(data)
        data[len(data) // 2] ^= 1
    elif damage in ("foreign", "other flags", "other version"):
        state = common.load(interrupted)
        torch.save({"foreign": {"fc.weight": torch.zeros(3)}, "other flags": state | {"flags": state["flags"] | {"lr": 0.3}},
                    "other version": state | {"net": {"old.name": torch.zeros(3)}}}[damage], interrupted)
        data = interrupted.read_bytes()
    interrupted.write_bytes({"half": data[:len(data) // 2], "text": b"hello", "empty": b""}.get(damage, bytes(data)))
    refused("hinge_ce", "--epochs", "3", words=["--overwrite" if damage.startswith("other") else "ckpt"])


@pytest.mark.parametrize("part", [0, 1])
def test_changed_data_are_not_mixed_into_a_run(refused, interrupted, monkeypatch, part):
    data = list(common.synthetic())
    data[part] = 255 - data[part][0], data[part][1]
    monkeypatch.setattr(common, "synthetic", lambda: data)
    refused("hinge_ce", "--epochs", "3", words=["other images"])


def test_logits_that_are_no_numbers_are_not_recorded(call, capsys, tmp_path):
    assert call("hinge_ce", "--epochs", "1", "--batch-size", "5000", "--lr", "9e29") == 2
    assert "not finite" in capsys.readouterr().err and not lines(tmp_path / "runs")


def test_a_malicious_checkpoint_is_not_executed(refused, interrupted, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)
    torch.save({"net": Bomb()}, interrupted)
    refused("hinge_ce", "--epochs", "3")
    assert not (tmp_path / "boom").exists()


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


@pytest.mark.parametrize("script, kills", [("lort", 12), ("ewb_fdr", 8)])
def test_killed_at_random_moments_it_ends_with_the_same_result(tmp_path, script, kills):
    """SIGKILL at 20 moments in all: at the start, in both stages, while saving; then the run is completed."""
    flags = ["--dataset", "synthetic", "--device", "cpu", "--epochs", "6", *(["--variant", "wb"] if script == "ewb_fdr" else [])]
    longest = None
    for out, number in (("whole", 0), ("killed", kills)):
        argv = [*flags, "--out", str(tmp_path / out)]
        code = KILLER.format(root=str(ROOT), script=script, argv=argv, kills=number, longest=longest, out=str(tmp_path / out))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        killed, resumed, longest = map(float, done.stdout.split())  # kills come within the time that a whole run takes
    assert killed == kills and resumed >= kills // 4  # most kills left something to resume
    a, b = lines(tmp_path / "whole"), lines(tmp_path / "killed")
    assert len(b) == 1 and a[0]["rows"] == b[0]["rows"] and a[0]["metrics"] == b[0]["metrics"]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


# ---- side by side, and out of room

def start(*flags, out, **kwargs):
    command = [sys.executable, str(ROOT / "methods" / "hinge_ce.py"), "--dataset", "synthetic", "--device", "cpu", "--out", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_runs_started_at_once_lose_nothing(tmp_path):
    processes = [start("--epochs", "1", "--seed", seed, out=tmp_path) for seed in ("0", "1", "1")]
    ends = [process.communicate(timeout=200) + (process.returncode,) for process in processes]
    assert ends[0][2] == 0 and sorted(end[2] for end in ends[1:]) in ([0, 0], [0, 2])  # the twin is refused, or finds it finished
    assert all("in use by another process" in end[1] for end in ends if end[2] == 2)
    assert sorted(line["seed"] for line in lines(tmp_path)) == [0, 1]


def test_a_full_disk_ends_with_one_line_and_keeps_what_was_there(tmp_path):
    assert start("--epochs", "1", out=tmp_path).wait(200) == 0
    before = (tmp_path / "results.jsonl").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, len(before) + 100))  # no file may grow beyond this
    process = start("--epochs", "1", "--seed", "1", out=tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1 and "intact" in err, err
    assert (tmp_path / "results.jsonl").read_bytes() == before and not list(tmp_path.glob("*/.*.tmp"))


def test_a_line_that_does_not_fit_leaves_the_others(tmp_path):
    code = f"""
import sys, resource; sys.path.insert(0, {str(ROOT)!r})
import common
from pathlib import Path
run = common.Run.__new__(common.Run)
run.results, run.folder = Path({str(tmp_path)!r}, "results.jsonl"), Path({str(tmp_path)!r}, "mine")
run.results.write_text('{{"rows": [], "folder": "other"}}\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
common.guard(lambda: run._record([{{"rows": [], "folder": "mine", "b": "x" * 100}}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "error" in done.stderr and [line["folder"] for line in lines(tmp_path)] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_folder_that_vanishes_ends_with_one_line(call, tmp_path, monkeypatch, capsys):
    real = common.Run.log

    def log(run, losses):
        real(run, losses)
        shutil.rmtree(run.folder)  # after the check in log(): it is saving that fails
    monkeypatch.setattr(common.Run, "log", log)
    assert call("hinge_ce", *TINY) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_ctrl_c_is_one_line(tmp_path):
    process = start("--epochs", "1000", out=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if "reported" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "goes on" in err and "Traceback" not in err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_out_of_memory_names_the_flag(call, monkeypatch, capsys, error):
    monkeypatch.setattr(common, "predict", lambda *_: (_ for _ in ()).throw(error))
    assert call("hinge_ce", *TINY) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run(call, capsys):
    assert call("hinge_ce", "--variant", "ce", "--lr", "1e6", "--warmup", "0", *TINY) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and "epoch 1" in err and "--lr" in err


# ---- run_all.sh

def run_all(*words, **environment):
    return subprocess.run(["bash", "run_all.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | environment)


@pytest.mark.parametrize("words, environment", [(["imagenet"], {}), ([], {"JOBS": "0"}), ([], {"JOBS": "abc"}), ([], {"SEEDS": " "}),
                                                ([], {"SEEDS": "00"}), ([], {"IMB": "1e2"}), ([], {"METHODS": "rbl vit"}), ([], {"METHODS": ""}),
                                                ([], {"METHODS": "../common"}), ([], {"FLAGS": "--seed 5"}), ([], {"OUT": "/dev/null/x"})])
def test_run_all_refuses(words, environment):
    done = run_all(*words, **environment)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


FAKE_PYTHON = """#!{python}
import json, os, sys, time
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
    os.makedirs(folder)
    open(folder + "/weights.pt", "w").close()
row = {{"row": name, "acc": {{"all": 1.0}}, "acc_flip": None, "paper": None}}
with open(flags["--out"] + "/results.jsonl", "a") as file:
    file.write(json.dumps({{"method": name, "dataset": flags["--dataset"], "imb_factor": 1.0, "seed": int(flags["--seed"]), "flags": {{}},
                           "rows": [row], "seconds": 1.0, "command": " ".join(args)}}) + "\\n")
"""


@pytest.fixture
def fake(tmp_path):
    """The environment in which run_all.sh meets a `python` that only notes in tmp_path/trace what it was asked to do."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
    (tmp_path / "bin" / "python").chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "TRACE": str(tmp_path / "trace")}


def test_run_all_skips_what_is_recorded_and_goes_on_after_a_failure(fake, tmp_path):
    """22 runs a seed and imbalance factor."""
    trace = tmp_path / "trace"
    environment = fake | {"JOBS": "3", "SEEDS": "0\n1", "IMB": "100 50"}
    done = run_all("cifar100", BREAK="rbl-fixed", **environment)
    assert done.returncode == 1 and done.stderr.count("rbl.py --head fixed") == 4 and "broken on purpose" in done.stderr
    assert len(trace.read_text().splitlines()) == 4 * 22 and done.stdout.count("finished:") == 4 * 21 and "| rbl-rbl |" in done.stdout
    trace.unlink()
    done = run_all("cifar100", **environment)  # what failed is run again, and nothing else
    assert done.returncode == 0 and done.stdout.count("recorded:") == 4 * 21, done.stderr
    assert [line.split()[:3] for line in trace.read_text().splitlines()] == [["methods/rbl.py", "--head", "fixed"]] * 4
    trace.unlink()
    assert run_all("cifar100", **environment | {"METHODS": "lort\thinge_ce.py", "SEEDS": "7"}).stdout.count("finished:") == 2 * 4
    trace.unlink()
    done = run_all("one-protocol", **environment | {"SEEDS": "0", "IMB": "100"})
    runs = trace.read_text().splitlines()
    assert run_all("cifar10", **environment | {"SEEDS": "0"}).stdout.count("finished:") == 22 + 21  # no cones at IF 50
    assert done.returncode == 0 and len(runs) == 22 and sum("--augment crop" in run for run in runs) == 3
    assert all("--backbone resnet34 --epochs 200 --batch-size 128 --val-per-class 20 --dataset cifar100" in run for run in runs)


@pytest.mark.parametrize("words", ["cifar10", "cifar100", "one-protocol"])
def test_no_run_of_run_all_is_refused(fake, tmp_path, monkeypatch, words):
    """Every command up to its training, with 100 (or 10) classes of one grey image in place of CIFAR."""
    class Begins(Exception):
        pass

    def begin(*_, **__):
        raise Begins

    def data(args, device):
        labels = torch.arange(10 if words == "cifar10" else 100)
        split = common.Split(torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8), labels, torch.zeros(3), torch.ones(3))
        return common.Data(split, split if args.val_per_class else None, split, [1] * len(labels), {}, None)
    monkeypatch.setattr(common, "load_data", data)
    monkeypatch.setattr(common, "load_net", lambda *_, **__: {})
    monkeypatch.setattr(common.Run, "begin", begin)
    run_all(words, **fake, SEEDS="0")
    for number, line in enumerate((tmp_path / "trace").read_text().splitlines()):
        script, *flags = line.split()
        with pytest.raises(Begins):
            importlib.import_module(Path(script).stem).main([*flags, "--out", str(tmp_path / str(number))])
    assert number == 21


def test_a_stopped_run_all_leaves_no_run_behind(fake, tmp_path):
    trace = tmp_path / "trace"
    environment = fake | {"JOBS": "2", "SLEEP": "1"}
    process = subprocess.Popen(["bash", "run_all.sh", "cifar100"], cwd=ROOT, env=os.environ | environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not trace.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) != 0
    time.sleep(2.5)
    assert len(trace.read_text().splitlines()) <= 2 and not (tmp_path / "out" / "cifar100" / "results.jsonl").exists()
