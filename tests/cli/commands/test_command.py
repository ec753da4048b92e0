"""The command as a whole: light until it has something to do, errors on one line, JSON alone, and a page that names what there is."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fnrun.cli.commands import COMMANDS
from tests.cli.commands.made import document, told

PAGE = Path(__file__).parents[3] / "docs" / "command.md"


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize("args", [["--help"], ["show", "--help"], ["ls", "RUNS"], ["plot", "RUNS/whole", "--json"]])
def test_what_reads_no_checkpoint_imports_nothing_heavy(args, runs):
    args = [arg.replace("RUNS", str(runs)) for arg in args]
    heavy = [
        "torch",
        "numpy",
        "jax",
        "orbax",
        "tensorstore",
        "matplotlib",
        "optree",
        "wandb",
        *(["rich", "yaml"] if "--help" in args else []),
    ]
    code = f"import sys; from fnrun.cli.commands import main; assert main({args}) == 0; print([m for m in {heavy} if m in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


def test_it_is_a_script_and_a_module(runs):
    script = Path(sys.executable).with_name("fnrun")
    for command in ([str(script)], [sys.executable, "-m", "fnrun"]):
        done = subprocess.run([*command, "ls", str(runs)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert str(runs / "whole") in done.stdout


def test_a_reader_that_goes_away_is_no_error(runs):
    """The reader closes before anything is written: what is printed, and buffered, has nowhere to go."""
    code = "import sys; sys.stdin.readline(); from fnrun.cli.commands import main; sys.exit(main(['ls', sys.argv[1]]))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code, runs], stdin=-1, stdout=-1, stderr=-1, env=buffered) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_json(name, capsys):
    code, out, err = told(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: fnrun {name}")
    assert "--json" in out
    assert max(map(len, out.splitlines()[1:])) <= 100
    assert name in told(capsys, "--help")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["shwo"], "error: there is no command 'shwo'; there are: ls, show,"),
        (["ls", "--jsno"], "error: Unrecognized options: --jsno; Perhaps you meant: --json"),
        (["plot", "x", "--by", "day"], "error: invalid choice 'day' for argument '--by'"),
        (["diff", "x"], "error: Missing from fnrun diff: B what it is compared with"),
        (["gc", "--keep", "many"], "error: Error parsing --keep"),
    ],
)
def test_a_wrong_call_is_one_line_and_2(args, message, capsys):
    code, out, err = told(capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


@pytest.mark.parametrize("command", ["show", "export", "plot", "gc"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("whol", "there is nothing there; near: {runs}/whole"),
        ("whole/run.lock.py", "there is nothing there"),
        ("whole/config.yaml", "it is a file"),
        ("", "it holds runs: other, resumed, whole"),
        ("../empty", "it is an empty directory"),
    ],
)
def test_a_path_that_holds_something_else_is_told_what(command, path, message, runs, capsys):
    (runs.parent / "empty").mkdir(exist_ok=True)
    code, out, err = told(capsys, command, runs / path, *(["--out", "x.pt"] if command == "export" else []))
    assert (code, out) == (2, "")
    assert message.format(runs=runs) in err


def test_a_part_of_a_run_is_no_run(runs, capsys):
    for path, what in (("whole/checkpoints", "it holds checkpoints"), ("whole/checkpoints/00000006-00000010", "it is a checkpoint")):
        code, _, err = told(capsys, "plot", runs / path)
        assert (code, err) == (2, f"error: {runs / path} is no run: {what} of the run {runs / 'whole'}\n")


def test_a_terminal_without_unicode_gets_what_it_can_show(runs):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for args in (["ls", runs], ["plot", runs / "whole"], ["ls", "--jsno"]):
        done = subprocess.run([sys.executable, "-m", "fnrun", *args], capture_output=True, env=environment)
        assert b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"error: Unrecognized options: --jsno; Perhaps")


def test_json_has_no_nan(runs, tmp_path, capsys):
    """`document` refuses what only Python reads."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("experiment: x\nconfig: {}\n")
    (run / "metrics.jsonl").write_text('{"ticks": 1, "at": "", "step": 1, "epoch": 1, "loss": "NaN", "clock": {}}\n')
    (row,) = document(capsys, "ls", tmp_path)
    assert row["metrics"]["loss"] == {"mode": "min", "last": "NaN", "best": None, "best_step": None}


def test_the_page_names_every_command_and_flag_and_no_other():
    page = PAGE.read_text()
    named = {match[1]: set() for match in re.finditer(r"^## `fnrun (\w+)", page, re.MULTILINE)}
    assert list(named) == list(COMMANDS)
    for name, section in re.findall(r"^## `fnrun (\w+).*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(COMMANDS[name])}
        own = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?:\.[a-z-]+)?", section))
        unknown = {flag for flag in own - flags if name != "fork"}  # its other flags are the experiment's
        assert not unknown, f"{name}: {unknown}"
        positional = {"--directory", "--path", "--runs", "--run", "--a", "--b", "--overrides", "--json"}
        assert flags - own - positional == set(), f"{name} does not say"
