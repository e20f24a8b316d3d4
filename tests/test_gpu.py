"""What only a GPU can show; skipped where there is none. All on the generated set, a few seconds a test."""
import pytest
import torch

import common
import rbl
from conftest import result, same, saved
from test_runs import MODES

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EXACT = ("--device", DEVICE, "--epochs", "3", "--deterministic")
ALL_MODES = [(script, mode) for script in MODES for mode in MODES[script]]


@pytest.mark.parametrize("script, mode", ALL_MODES)
def test_a_captured_run_is_the_uncaptured_one_bit_for_bit(call, tmp_path, capsys, script, mode):
    for precision in ("fp32", "bf16"):
        flags = (*EXACT, "--precision", precision, *mode)
        assert call(script, *flags, out=tmp_path / f"{precision} captured") == 0
        assert "not captured" not in capsys.readouterr().out
        assert call(script, *flags, "--no-graph", out=tmp_path / f"{precision} plain") == 0
        a, b = (tmp_path / f"{precision} {kind}" for kind in ("captured", "plain"))
        assert same(saved(a)["net"], saved(b)["net"]) and result(a)["rows"] == result(b)["rows"]


@pytest.mark.parametrize("script", MODES)
def test_the_same_command_gives_the_same_weights(call, tmp_path, script):
    for out in ("a", "b"):
        assert call(script, *EXACT, out=tmp_path / out) == 0
    assert same(saved(tmp_path / "a")["net"], saved(tmp_path / "b")["net"])


@pytest.mark.parametrize("script", ["lort", "rbl", "ewb_fdr"])
def test_an_interrupted_run_goes_on_to_the_same_weights(call, tmp_path, monkeypatch, script):
    flags = (*EXACT, *(("--variant", "wb") if script == "ewb_fdr" else ()))
    assert call(script, *flags, out=tmp_path / "whole") == 0
    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    real, seen = common.Run.log, []

    def log(run, losses, **extra):
        real(run, losses, **extra)
        seen.append(run.epoch)
        if len(seen) % 2 == 0:  # every second epoch is lost
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", log)
        codes = [call(script, *flags, out=tmp_path / "pieces") for _ in range(12)]
    assert 130 in codes and codes[-1] == 0 and same(saved(tmp_path / "whole")["net"], saved(tmp_path / "pieces")["net"])


@pytest.mark.parametrize("script", MODES)
def test_a_gpu_learns_what_a_cpu_learns(call, tmp_path, script):
    for device in ("cpu", DEVICE):
        assert call(script, "--device", device, out=tmp_path / device) == 0
    cpu, gpu = (result(tmp_path / device)["rows"][-1]["acc"]["all"] for device in ("cpu", DEVICE))
    assert abs(cpu - gpu) < 6  # other random numbers: as two seeds differ
    assert saved(tmp_path / DEVICE, "test_logits.pt")["labels"].device.type == "cpu"


def test_the_operations_are_those_of_the_cpu():
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    for policy in rbl.transforms.AutoAugment(rbl.transforms.AutoAugmentPolicy.CIFAR10).policies:
        for name, _, level in policy:
            cpu, gpu = (rbl.operation(images.to(device), name, level, 1).cpu().int() for device in ("cpu", DEVICE))
            assert ((cpu - gpu).abs() > 1).float().mean() < 0.01, (name, level)


def test_too_little_memory_is_one_line(call, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        assert call("hinge_ce", "--device", DEVICE, "--backbone", "resnet34", "--batch-size", "4096") == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and "--batch-size" in err
