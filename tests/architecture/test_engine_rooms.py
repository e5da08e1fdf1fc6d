"""The sub-rooms of dstrain/engine: each is entered by its door, and none leads back to itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[2] / "dstrain" / "engine"
PACKAGE = "dstrain.engine"


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import of engine's in a file, deferred ones included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.lineno, node.module
            if node.module == PACKAGE or (ENGINE / Path(*node.module.split(".")[2:])).is_dir():
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"


def place(module: str) -> Path | None:
    """Return the file of a module of engine's; None for anything else."""
    parts = module.split(".")
    if parts[:2] != PACKAGE.split("."):
        return None
    path = ENGINE.joinpath(*parts[2:])
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def test_sub_rooms_are_entered_by_their_door() -> None:
    found = []
    for file in sorted(ENGINE.rglob("*.py")):
        for line, module in imported(file):
            target = place(module)
            if target is None or target.name == "__init__.py" or target.parent == ENGINE:
                continue
            if target.parent != file.parent and module.count(".") > 2:
                found.append(f"{file.relative_to(ENGINE)}:{line}: {module}")
    # The settings of the process are a module that is used as one, and stands in its door.
    assert [line for line in found if not line.endswith(".process_settings")] == []


def test_no_file_leads_back_to_itself() -> None:
    graph: dict[Path, set[Path]] = {}
    for file in ENGINE.rglob("*.py"):
        targets = {place(module) for _, module in imported(file)}
        graph[file] = {
            t for t in targets if t is not None and t not in (file, ENGINE / "__init__.py")
        }
        if file.name == "__init__.py":
            continue
        graph[file].discard(
            file.parent / "__init__.py"
        )  # `from dstrain.engine.zero import x` inside
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert len(order) == len(graph)


def test_files_are_short() -> None:
    long = {f.name: n for f in ENGINE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 400}
    assert long == {}
