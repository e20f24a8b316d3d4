"""The README's commands exist, its table is the recorded one, and every row announced can be run."""
import json
import re
import shlex
import subprocess
import sys

import pytest

import common
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
RECORDED = [json.loads(line) for name in ("reference_results.jsonl", "tried_results.jsonl")
            for line in (ROOT / "tests" / name).read_text().splitlines()]


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


def test_the_table_is_the_one_that_is_printed():
    printed = subprocess.run([sys.executable, "common.py", "tests/reference_results.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0
    assert re.search(r"<!-- results -->\n(.*?)<!-- /results -->", README, re.S).group(1) == printed.stdout


def test_commands_name_files_and_flags_that_exist():
    assert len(commands()) >= 8
    for command in commands():
        for part in command.split("&&"):
            words = shlex.split(part)
            if words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file()
                known = (ROOT / words[1]).read_text() + (ROOT / "common.py").read_text()
                assert all(f'"{word}"' in known for word in words if word.startswith("--") and word != "--help"), command
    assert (ROOT / "run_all.sh").is_file() and "python -m pytest -q tests" in (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"`(\w+)\.py`? ", README)) >= set(SCRIPTS)


@pytest.mark.parametrize("result", RECORDED, ids=lambda result: result["command"])
def test_recorded_rows_are_their_scripts_rows(result):
    script = __import__(result["method"])
    words = shlex.split(result["command"])
    assert words[0] == f"methods/{result['method']}.py"
    args = script.parse_args(words[1:])
    assert (args.dataset, args.imb_factor) == (result["dataset"], result["imb_factor"])
    for row in result["rows"]:
        assert row["paper"] == common.row(row["row"], script.PAPER, args, None)["paper"]
        assert row["acc"] or result["seconds"] is None  # a number has a run behind it
        if row["acc"]:
            assert {"seed", "device", "date", "torch", "subset"} <= result.keys()
            assert all(result["flags"][flag] == vars(args)[flag] for flag in script.RECIPE if flag in result["flags"])  # it still means this run


def test_no_number_of_the_paper_stands_beside_an_ablation():
    import lwr
    for flags, name, number in ((["--strength", "0"], "bs", 46.3), ([], "bs+lwr", 50.7), (["--theta", "0"], "bs+lwr", None),
                                (["--base", "focal", "--strength", "0"], "focal", 41.9), (["--epochs", "2"], "bs+lwr", None),
                                (["--val-per-class", "20"], "bs+lwr", None), (["--subset-seed", "1"], "bs+lwr", None),
                                (["--strength", "1"], "bs+lwr", None),
                                (["--base", "focal", "--strength", "0", "--gamma", "2"], "focal", None)):
        paper = common.row(name, lwr.PAPER, lwr.parse_args(flags), None)["paper"]
        assert (paper and paper["all"]) == number, flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_reads_well(script, capsys):
    with pytest.raises(SystemExit) as stop:
        __import__(script).parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Departures" in text
    common_flags, own = text.split("\ncommon flags:")[1].split("\n\n")[:2]  # the paper's own flags come after the common ones
    assert "(default: cifar100)" in common_flags and "--" in own
    assert f"(default: {__import__(script).RECIPE['epochs']})" in common_flags  # the paper's, not None


def test_nothing_of_a_machine_is_in_the_project():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        if name != "tests/test_readme.py":
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", (ROOT / name).read_text()), name


def test_sizes():
    assert len((ROOT / "common.py").read_text().splitlines()) <= 810
    for script in SCRIPTS:
        assert 100 <= len((ROOT / "methods" / f"{script}.py").read_text().splitlines()) <= 250
    for path in [ROOT / "common.py", *(ROOT / "methods").glob("*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 128, path
