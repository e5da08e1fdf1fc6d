"""The inside of the rooms: no circles of files, nobody passes the Trainer around, small files."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_imports import PACKAGE, ROOT, imports_of

MOST_LINES = 400
# Generated from DeepSpeed's own models: a table, which nobody reads from top to bottom.
TABLES = {"config/schema/generated.py"}
# Who makes a Trainer and runs it may hand it to its own helpers: these rooms are its users.
USERS_OF_A_TRAINER = {"tasks", "cli"}
MOST_ANY = 0.08


def files() -> list[Path]:
    """List the files of the package."""
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_of(file: Path) -> str:
    """Return a file's module, without the package's name: "trainer.base"."""
    inside = file.relative_to(ROOT / PACKAGE).with_suffix("")
    parts = inside.parts[:-1] if inside.name == "__init__" else inside.parts
    return ".".join(parts)


def arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return, for each module, those of ours that it imports anywhere, for types alone too."""
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        package = f"{PACKAGE}.{module}" if file.name == "__init__.py" else ""
        package = package or f"{PACKAGE}.{module}".rpartition(".")[0]
        targets: set[str] = set()
        for entry in imports_of(ast.parse(file.read_text()), package):
            if entry.module.partition(".")[0] != PACKAGE:
                continue
            base = entry.module.removeprefix(PACKAGE).lstrip(".")
            named = [f"{base}.{name}".lstrip(".") for name in entry.names]
            submodules = [name for name in named if name in modules]
            # `from room import file` is an arrow to the file; the room's door is one only where
            # something of its own is taken.
            targets |= set(submodules)
            if base in modules and len(submodules) < max(1, len(named)):
                targets.add(base)
        found[module] = targets - {module}
    return found


def test_no_circle_of_imports() -> None:
    """Deferred imports and those for types alone are counted: a circle is a circle."""
    modules = {module_of(file): file for file in files() if module_of(file)}
    graph = arrows(modules)
    assert sum(map(len, graph.values())) > 500, "arrows are found"
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "back",
    [
        "def f():\n    from dstrain.a.one import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dstrain.a import one",
    ],
)
def test_a_deferred_circle_is_one(back: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("from dstrain.a.two import f")
    two.write_text(back)
    graph = arrows({"a.one": one, "a.two": two})
    assert graph == {"a.one": {"a.two"}, "a.two": {"a.one"}}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def annotations(function: ast.FunctionDef) -> list[ast.expr]:
    """List the annotations of a function's parameters."""
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [p.annotation for p in parameters if p is not None and p.annotation is not None]


def test_no_function_takes_a_trainer() -> None:
    """Values go from room to room; a Trainer, which has all of them, does not."""
    found = []
    for file in files():
        room = module_of(file).partition(".")[0]
        if room in USERS_OF_A_TRAINER:
            continue
        for function in functions(ast.parse(file.read_text())):
            names = {
                node.id
                for annotation in annotations(function)
                for node in ast.walk(annotation)
                if isinstance(node, ast.Name)
            }
            parameters = {p.arg for p in [*function.args.args, *function.args.kwonlyargs]}
            if names & {"Trainer", "TrainerBase"} or "trainer" in parameters:
                found.append(f"{file.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert not found, "\n" + "\n".join(found)


def test_a_file_can_be_read_in_one_sitting() -> None:
    long = {
        str(file.relative_to(ROOT / PACKAGE)): lines
        for file in files()
        if (lines := len(file.read_text().splitlines())) > MOST_LINES
    }
    assert set(long) <= TABLES, long


def test_the_trainers_parts_have_types() -> None:
    """``Any`` stands where a subclass of a user's, or a library, decides, and nowhere else."""
    count = of_any = 0
    for file in files():
        if module_of(file).partition(".")[0] not in ("trainer", "training"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            found: list[ast.expr] = []
            if isinstance(node, ast.FunctionDef):
                found = annotations(node) + ([] if node.returns is None else [node.returns])
            elif isinstance(node, ast.AnnAssign):
                found = [node.annotation]
            for annotation in found:
                count += 1
                of_any += any(
                    isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(annotation)
                )
    assert count > 1000
    assert of_any / count < MOST_ANY, f"{of_any} of {count}"
