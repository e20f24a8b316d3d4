"""The README's commands exist, its table is the recorded one; the code stays plain."""
import ast
import json
import re
import shlex
import subprocess
import sys

import pytest

import common
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
REFERENCE, TRIED = ([json.loads(line) for line in (ROOT / "tests" / f"{name}_results.jsonl").read_text().splitlines()]
                    for name in ("reference", "tried"))
CODE = [ROOT / "common.py", *sorted((ROOT / "methods").glob("*.py"))]


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


def test_what_is_not_run_can_be_run_and_is_not_recorded():
    sentence = re.search(r"Not run yet:\n(.*?)\n\n", README, re.S)
    if sentence is None:
        return
    def recipe(command):
        script, *words = shlex.split(command)
        flags = vars(__import__(script.split("/")[1].removesuffix(".py")).parse_args(words))
        return script, {name: value for name, value in flags.items() if name not in ("precision", "command", "published", "stage1")}
    recorded = [recipe(run["command"]) for run in REFERENCE]
    listed = re.findall(r"`(methods/[^`]*)`", sentence.group(1).replace("\n", " "))
    assert listed and not [command for command in listed if recipe(command) in recorded]


@pytest.mark.parametrize("result", REFERENCE + TRIED, ids=lambda result: result["command"])
def test_recorded_rows_are_their_scripts_rows(result):
    script = __import__(result["method"])
    words = shlex.split(result["command"])
    assert words[0] == f"methods/{result['method']}.py"
    if "commit" in result:  # of code that has been changed since
        return
    args = script.parse_args(words[1:])
    assert (args.dataset, args.imb_factor) == (result["dataset"], result["imb_factor"])
    assert result["seconds"] > 0 and {"seed", "device", "date", "torch", "subset"} <= result.keys()
    for row in result["rows"]:
        expected = common.paper_number(script.PAPER, row["row"], args)
        assert row["paper"] == expected or (row["paper"] is None and result["flags"].get("stage1"))  # the file of stage 1 may say otherwise
    for flag in {*script.RECIPE, "weight_decay"}:  # the command still means this run
        assert result["flags"].get(flag, vars(args)[flag]) == vars(args)[flag], flag


def test_no_number_of_the_paper_stands_beside_an_ablation():
    import lwr
    for flags, name, number in ((["--strength", "0"], "bs", 46.3), ([], "bs+lwr", 50.7), (["--theta", "0"], "bs+lwr", None),
                                (["--base", "focal", "--strength", "0"], "focal", 41.9), (["--epochs", "2"], "bs+lwr", None),
                                (["--val-per-class", "20"], "bs+lwr", None), (["--subset-seed", "1"], "bs+lwr", None),
                                (["--strength", "1"], "bs+lwr", None),
                                (["--base", "focal", "--strength", "0", "--gamma", "2"], "focal", None)):
        paper = common.paper_number(lwr.PAPER, name, lwr.parse_args(flags))
        assert (paper and paper["all"]) == number, flags


def test_the_numbers_of_wb_are_of_200_epochs():
    import ewb_fdr
    for variant, epochs in {"ce": 200, "wd": 200, "wb": 200, "cb": 320, "etf": 320, "fr-etf": 320}.items():
        args = ewb_fdr.parse_args(["--variant", variant])
        assert args.epochs == epochs and args.published
        assert args.weight_decay == (0 if variant in ("ce", "cb") else 5e-3)
        other = ewb_fdr.parse_args(["--variant", variant, "--epochs", "100"])
        assert not other.published


def test_table_1_holds_validation_images_out():
    import lort
    for flags, held_out, published in (([], 20, True), (["--val-per-class", "20"], 20, True), (["--val-per-class", "10"], 10, False)):
        args = lort.parse_args(["--retrain", "all", *flags])
        assert (args.val_per_class, args.published) == (held_out, published)
    assert lort.parse_args([]).val_per_class == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_reads_well(script, capsys):
    with pytest.raises(SystemExit) as stop:
        __import__(script).parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Departures" in text
    common_flags, own = text.split("\ncommon flags:")[1].split("\n\n")[:2]  # the paper's own flags come after these
    assert "(default: cifar100)" in " ".join(common_flags.split()) and "--" in own
    assert f"(default: {__import__(script).RECIPE['epochs']})" in common_flags


def test_help_has_the_defaults_of_the_variant_and_the_data_set(capsys):
    import hinge_ce
    with pytest.raises(SystemExit):
        hinge_ce.parse_args(["--variant", "ce", "--dataset", "cifar10", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "output dimensions (default: 64)" in text and "rate rises (default: 0)" in text


def test_nothing_of_a_machine_is_in_the_project():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        if name != "tests/test_readme.py":
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", (ROOT / name).read_text()), name


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_one_thought_a_line(path):
    """Syntax nodes per line of code: cleanrl's ppo.py has 6.0, nanoGPT's train.py 5.5. No walrus, 110 columns."""
    text = path.read_text()
    nodes, docs = list(ast.walk(ast.parse(text))), set()
    for node in nodes:
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [line for k, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#") and k not in docs]
    density = sum(isinstance(node, (ast.stmt, ast.expr)) for node in nodes) / len(code)
    assert density <= (7.5 if path.name == "common.py" else 8), density
    assert not any(isinstance(node, ast.NamedExpr) for node in nodes)
    assert max(map(len, text.splitlines())) <= 110
