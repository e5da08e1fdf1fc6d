"""What the command line says of itself."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from dstrain.cli.main import main
from dstrain.cli.train import TASKS


@pytest.fixture
def printed(monkeypatch, capsys):
    """Run a command that succeeds in this process; its standard output."""
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> str:
        try:
            status = main(words)
        except SystemExit as end:  # argparse leaves this way
            status = end.code
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert captured.err == ""
        return captured.out

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_shows_a_launch(printed, words):
    text = printed(*words)
    assert text.startswith("usage: dstrain COMMAND")
    for part in ("train TASK", "explain", "causal-lm", "deepspeed --num_gpus", "--module dstrain"):
        assert part in text


def test_help_names_every_action_on_checkpoints(printed):
    actions = re.findall(r"^  (\w+) ", printed("checkpoint", "--help"), re.MULTILINE)
    assert {"ls", "diff", "convert"} < set(actions)
    (line,) = (line for line in printed().splitlines() if "checkpoint ACTION" in line)
    assert set(re.findall(r"\w+", line.split(":")[1])) == set(actions)


def test_help_of_train_names_every_task(printed):
    text = printed("train", "--help")
    for task in TASKS:
        assert task in text


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_explains_every_flag_once(printed, task):
    """Catches a field without a flag or without a word on it, and lines that no terminal holds."""
    import importlib

    text = printed("train", task, "--help")
    assert text.startswith(f"usage: dstrain train {task} [flags]\n")
    for cls in importlib.import_module(TASKS[task]).argument_classes():
        for field in dataclasses.fields(cls):
            # A flag, its value's name, two spaces or a line break, and then what it means.
            found = re.findall(rf"^  --{field.name}( \S+)*(  +|\n {{10,}})\S", text, re.MULTILINE)
            assert len(found) == 1, f"--{field.name} is explained {len(found)} times"
            assert field.metadata["help"].split()[0] in text
            for choice in field.metadata.get("choices", ()):
                assert str(choice) in text
    assert max(map(len, text.splitlines())) <= 100
    assert "SUPPRESS" not in text
    assert "dataclass" not in text


def test_flags_may_have_dashes(printed):
    """As with the command lines of transformers' scripts."""
    config = json.loads(
        printed("explain", "--json", "--learning-rate=1e-3", "--zero-stage", "3", "--bf16")
    )["deepspeed"]
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["zero_optimization"]["stage"] == 3
    assert config["bf16"]["enabled"] is True


def test_a_later_flag_wins(printed):
    """`launch/quickstart.sh` puts the user's flags behind its own."""
    text = printed("explain", "--json", "--learning_rate", "1e-3", "--learning_rate", "1e-4")
    assert json.loads(text)["deepspeed"]["optimizer"]["params"]["lr"] == 1e-4


def leaves(node: dict, prefix: str = "") -> set[str]:
    return {
        name
        for key, value in node.items()
        for name in (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        )
    }


def test_explain_prints_json_with_a_reason_for_every_key(printed):
    text = printed(
        "explain", "--json", "--world_size", "4", "--deepspeed", "zero3", "--max_steps", "9"
    )
    explained = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    config = explained["deepspeed"]
    assert config["zero_optimization"]["stage"] == 3
    assert config["train_batch_size"] == 32
    assert set(explained["provenance"]) == leaves(config)
    for reason in explained["provenance"].values():
        assert reason["source"] in ("config", "argument", "derived", "default")
        assert reason["detail"]
    assert "auto" not in json.dumps(config)


def test_explain_prints_one_line_per_key(printed):
    lines = printed("explain", "--world_size", "4", "--bf16", "--zero_stage", "2").splitlines()
    assert "zero_optimization.stage" in lines[0]
    assert "bf16.enabled" in lines[1]
    batch = next(line for line in lines if line.startswith("train_batch_size "))
    assert batch.split(maxsplit=2)[1:] == ["32", "micro-batch 8 x accumulation 1 x ranks 4"]


def test_version(printed):
    import dstrain

    assert printed("--version").strip() == dstrain.__version__


def test_a_command_that_trained_ends_as_python_does():
    """Threads are waited for, exit functions run, output is flushed, the status is the command's.

    Destructors of C++ libraries alone are left out, which sometimes aborted a run that was done.
    """
    script = """
import atexit, threading, torch
from dstrain.cli import main
main.main = lambda: 75
atexit.register(print, "exit function")
threading.Timer(0.3, print, ["thread"]).start()
main.entry()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split("\n")) == (75, ["thread", "exit function", ""])
