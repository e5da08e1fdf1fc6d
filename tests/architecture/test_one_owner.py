"""A value that the DeepSpeed config may decide is read from the resolved config, not the arguments.

The user's arguments keep what the user wrote. With a config that decides otherwise, whoever reads
them computes with a value that does not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.config.resolution.running import BOUND_ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]
# Their work is to read the arguments as they were written.
OWNERS = {"arguments", "config"}
NAMES = {"args", "arguments"}


def reads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each use of a bound argument of an object of arguments."""
    names = NAMES | {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.annotation is not None
        and "TrainingArguments" in ast.unparse(argument.annotation)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif _is_call_of(node, {"getattr", "setattr", "hasattr"}) and len(node.args) > 1:
            owner, name = node.args[0], getattr(node.args[1], "value", "")
        else:
            continue
        last = getattr(owner, "attr", None) or getattr(owner, "id", None)
        if name in BOUND_ARGUMENTS and last in names:
            yield node.lineno, ast.unparse(node)


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def violations(package: Path) -> list[str]:
    """Return "file:line: text" of each use outside of the rooms that own the arguments."""
    return [
        f"{file.relative_to(package.parent)}:{line}: {text}"
        for file in sorted(package.rglob("*.py"))
        if file.relative_to(package).parts[0] not in OWNERS
        for line, text in reads(ast.parse(file.read_text(), str(file)))
    ]


def test_no_room_reads_an_argument_that_the_config_may_decide() -> None:
    found = violations(ROOT / "dstrain")
    assert not found, "take it from the ResolvedConfig:\n" + "\n".join(found)


def test_the_names_are_those_of_the_rules() -> None:
    assert {"learning_rate", "per_device_train_batch_size", "bf16", "optim"} <= BOUND_ARGUMENTS
    assert "logging_steps" not in BOUND_ARGUMENTS


@pytest.mark.parametrize(
    "source",
    [
        "def f(args): return args.learning_rate",
        "def f(self): return self.args.bf16 or None",
        "def f(trainer): trainer.args.max_grad_norm = 1.0",
        "def f(given: TrainingArguments): return given.optim",
        "def f(args): return getattr(args, 'weight_decay', 0.0)",
    ],
)
def test_a_read_is_found(source: str, tmp_path: Path) -> None:
    file = tmp_path / "dstrain" / "trainer" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert len(violations(tmp_path / "dstrain")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f(resolved): return resolved.learning_rate",
        "import torch\nx = torch.optim",
        "def f(args): return args.logging_steps",
    ],
)
def test_other_reads_are_left_alone(source: str, tmp_path: Path) -> None:
    file = tmp_path / "dstrain" / "trainer" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path / "dstrain") == []
