import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait for each other

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
SCRIPTS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))


@pytest.fixture
def call(tmp_path):
    """call("rbl", "--epochs", 1, ...) runs a script's main() here, on the synthetic set, and returns its exit code."""
    def call(script, *flags, out=tmp_path / "runs"):
        import common
        module, runs, init = __import__(script), [], common.Run.__init__
        argv = ["--dataset", "synthetic", "--device", "cpu", "--out", out, *flags]
        with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
            patch.setattr(common.Run, "__init__", lambda run, *args: (runs.append(run), init(run, *args))[1])
            common.guard(lambda: module.main([str(flag) for flag in argv]))
            raise SystemExit(0)
        for run in runs:
            if hasattr(run, "lock"):
                os.close(run.lock)  # as the end of a process would
        return stop.value.code
    return call


@pytest.fixture
def refused(call, capsys):
    """Run a script that must refuse: exit code 2, one line on stderr, which holds every one of `words`."""
    def refused(script, *flags, words=(), **kwargs):
        assert call(script, *flags, **kwargs) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in words), (words, lines[0])
    return refused
