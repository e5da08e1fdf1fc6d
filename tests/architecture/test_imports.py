"""The rooms of dstrain/README.md: who may import whom, and what `import dstrain` may load.

Imports are read from the syntax tree, not executed, so those inside functions count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dstrain"

# Room -> what it may import of ours, from the table of rooms. Itself always.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "arguments": {"core"},
    "config": {"core", "arguments"},
    "engine": {"core", "config"},
    "models": {"core", "config", "engine"},
    "data": {"core", "config"},
    "evaluation": {"core", "engine"},
    "checkpoint": {"core", "config", "engine", "models"},
    "reporting": {"core"},
    "hub": {"core", "arguments", "config", "checkpoint"},
    "search": {"core", "arguments", "engine"},
}
ROOMS["training"] = set(ROOMS) - {"hub", "search"}
ROOMS["trainer"] = set(ROOMS)
ROOMS["tasks"] = set(ROOMS)
ROOMS["cli"] = set(ROOMS)  # and the front door
SHARED_BY_TASKS = "common"  # in tasks: what every task may import, and which imports none of them
FREE_FILES = {"__init__.py", "__main__.py"}  # of the package itself: its front door

DEEPSPEED_ROOM = "engine"
BANNED_LIBRARIES = {"accelerate"}
# Rooms that work without torch: nothing at module level (functions may).
LAZY_ROOMS = {"core", "arguments", "config", "cli"}
LAZY_LIBRARIES = {"torch"}
# Rooms that do not know transformers, not even inside a function.
ROOMS_WITHOUT_TRANSFORMERS = {"core", "arguments", "config"}
# The one exception, inside a function: an enum that transformers' callbacks compare with `is`.
MAY_ASK_TRANSFORMERS = Path("arguments/compat.py")
# `from transformers import X` is public; its submodules move between releases.
SUBMODULE_FILE = "compat.py"
# What `import` of each of these must not load, in an interpreter of its own.
LIGHT_MODULES = ("dstrain", "dstrain.core", "dstrain.arguments", "dstrain.config", "dstrain.cli")
HEAVY_LIBRARIES = ("torch", "transformers", "deepspeed")

TOP_LEVEL = {
    *("pyproject.toml", "dstrain", "ds_configs", "launch", "tests", "benchmarks"),
    *("README.md", "constraints.txt"),
}


@dataclass(frozen=True)
class Import:
    """One imported module, with the names taken from it, at a line."""

    module: str
    line: int
    names: tuple[str, ...] = ()
    at_module_level: bool = False


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Yield each import in ``tree``, a module of ``package``; relative ones made absolute."""

    def absolute(name: str, level: int) -> str:
        if not level:
            return name
        parts = package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name])])

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, (), at_module_level)
            elif isinstance(child, ast.ImportFrom):
                module = absolute(child.module or "", child.level)
                names = tuple(alias.name for alias in child.names)
                yield Import(module, child.lineno, names, at_module_level)
            elif isinstance(child, ast.Call) and (name := _imported_by_call(child)):
                level = len(name) - len(name.lstrip("."))
                module = absolute(name.lstrip("."), level)
                yield Import(module, child.lineno, (), at_module_level)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                # Arrows all the same, but never executed.
                for statement in child.body:
                    yield from visit(ast.Module([statement], []), False)
                for statement in child.orelse:
                    yield from visit(ast.Module([statement], []), at_module_level)
                continue
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, at_module_level and not lazy)

    yield from visit(tree, True)


def _imported_by_call(call: ast.Call) -> str | None:
    """Return the module that `import_module("name")` or `__import__("name")` asks for."""
    called = ast.unparse(call.func).rpartition(".")[2]
    if called not in {"import_module", "__import__"} or not call.args:
        return None
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def violations(package_root: Path) -> list[str]:
    """Return "file:line: arrow: rule" for each import in ``package_root`` that breaks a rule."""
    found = []
    for file in sorted(package_root.rglob("*.py")):
        inside = file.relative_to(package_root)
        where = Path(PACKAGE) / inside
        if len(inside.parts) == 1:
            room = ""
            if inside.name not in FREE_FILES:
                found.append(f"{where}:1: {inside.name}: every file lives in a room")
                continue
        else:
            room = inside.parts[0]
            if room not in ROOMS:
                found.append(f"{where}:1: {room}: no such room in the table")
                continue
        package = ".".join((PACKAGE, *inside.parent.parts))
        for entry in imports_of(ast.parse(file.read_text(), str(file)), package):
            for arrow, rule in _broken_rules(room, inside, entry):
                found.append(f"{where}:{entry.line}: {arrow}: {rule}")
    return found


def _broken_rules(room: str, inside: Path, entry: Import) -> Iterator[tuple[str, str]]:
    """Yield (arrow, rule) for each rule that ``entry``, found in file ``inside``, breaks."""
    source = room or PACKAGE
    library, _, submodule = entry.module.partition(".")
    arrow = f"{source} -> {entry.module}"
    if library == PACKAGE and room not in ("", "cli"):  # those two see all
        yield from _wrong_ways(room, inside, entry)
    if library in BANNED_LIBRARIES:
        yield arrow, f"{library} is imported nowhere"
    if library == "deepspeed" and room != DEEPSPEED_ROOM:
        yield arrow, f"only {DEEPSPEED_ROOM} imports deepspeed"
    if library in LAZY_LIBRARIES and room in LAZY_ROOMS and entry.at_module_level:
        yield arrow, f"{room} loads no {library}: import it inside the function"
    asks = inside == MAY_ASK_TRANSFORMERS and not entry.at_module_level
    if library == "transformers" and room in ROOMS_WITHOUT_TRANSFORMERS and not asks:
        yield arrow, f"{room} does not import transformers"
    if library == "transformers" and submodule and inside.name != SUBMODULE_FILE:
        yield arrow, f"submodules of transformers only in a file named {SUBMODULE_FILE}"


def _wrong_ways(room: str, inside: Path, entry: Import) -> Iterator[tuple[str, str]]:
    """Yield (arrow, rule) for each of our own modules that ``room`` may not import."""
    targets = [entry.module.split(".")[1:]]
    if len(targets[0]) < 2:  # `from dstrain import data`, `from dstrain.tasks import causal_lm`
        targets = [[*targets[0], name] for name in entry.names] or targets
    for target in targets:
        other = target[0] if target else ""
        arrow = " -> ".join([room, ".".join([PACKAGE, *target])])
        allowed = ROOMS[room] | {room}
        if other not in ROOMS:
            yield arrow, "a room imports rooms, not the front door"
        elif other not in allowed:
            names = ", ".join(name for name in ROOMS if name in ROOMS[room]) or "nothing of ours"
            yield arrow, f"{room} may import {names}"
        elif room == other == "tasks" and len(inside.parts) > 2:
            own = inside.parts[1]
            if len(target) > 1 and target[1] not in (own, SHARED_BY_TASKS):
                yield arrow, f"task {own} may not import another task"


# ------------------------------------------------------------------ the house as it stands


def test_every_import_goes_the_right_way() -> None:
    found = violations(ROOT / PACKAGE)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_is_light(module: str) -> None:
    inner = module.split(".")[1:]
    if not (ROOT.joinpath(PACKAGE, *inner) / "__init__.py").exists():
        pytest.skip(f"{module} does not exist yet")
    code = f"import sys, {module}; print(*sorted(set({HEAVY_LIBRARIES}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"import {module} loads {done.stdout.strip()}"


def test_top_level_holds_nothing_else() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    entries = {name.partition("/")[0] for name in done.stdout.split("\0") if name}
    unexpected = {name for name in entries - TOP_LEVEL if not name.startswith(".")}
    assert not unexpected, f"unexpected at the top level: {sorted(unexpected)}"


# ------------------------------------------------------------------ the walker can fail


def house(folder: Path, files: dict[str, str]) -> Path:
    """Build a made-up package from path -> source."""
    for name, source in files.items():
        file = folder / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
    return folder / PACKAGE


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "core/a.py",
            "import os\nfrom dstrain.config import resolve",
            "dstrain/core/a.py:2: core -> dstrain.config.resolve: core may import nothing of ours",
        ),
        (
            "data/a.py",
            "def f():\n    from ..engine.zero import gather",
            "data/a.py:2: data -> dstrain.engine.zero: data may import core, config",
        ),
        ("data/a.py", "from dstrain import engine", "data -> dstrain.engine: "),
        ("data/a.py", "from .. import engine", "data -> dstrain.engine: "),
        ("data/a.py", "import dstrain.trainer", "data -> dstrain.trainer: "),
        ("data/a.py", "from dstrain import Trainer", "a room imports rooms, not the front door"),
        ("data/a.py", "import dstrain", "a room imports rooms, not the front door"),
        ("engine/a.py", "import dstrain.cli as c", "engine -> dstrain.cli: engine may import"),
        (
            "reporting/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dstrain.data import x",
            "a.py:3: reporting -> dstrain.data.x",
        ),
        ("trainer/a.py", "from dstrain.tasks import seq2seq", "trainer -> dstrain.tasks.seq2seq"),
        (
            "tasks/causal_lm/a.py",
            "from dstrain.tasks.seq2seq.loss import loss",
            "task causal_lm may not import another task",
        ),
        ("tasks/causal_lm/a.py", "from .. import seq2seq", "may not import another task"),
        (
            "tasks/common/a.py",
            "from dstrain.tasks.seq2seq import job",
            "task common may not import another task",
        ),
        ("tasks/causal_lm/a.py", "import dstrain.cli", "tasks -> dstrain.cli"),
        ("trainer/a.py", "import deepspeed", "only engine imports deepspeed"),
        (
            "trainer/a.py",
            "def f():\n    import deepspeed.comm as c",
            "a.py:2: trainer -> deepspeed",
        ),
        (
            "trainer/a.py",
            'import importlib\nx = importlib.import_module("deepspeed")',
            "a.py:2: trainer -> deepspeed: only engine",
        ),
        ("trainer/a.py", '__import__("deepspeed")', "only engine imports deepspeed"),
        ("__init__.py", "import deepspeed", "only engine imports deepspeed"),
        ("engine/a.py", "from accelerate import x", "accelerate is imported nowhere"),
        ("cli/a.py", "try:\n    import torch\nexcept ImportError: ...", "cli loads no torch"),
        ("config/a.py", "from transformers import X", "config does not import transformers"),
        (
            "arguments/compat.py",
            "from transformers.training_args import X",
            "arguments does not import transformers",
        ),
        (
            "config/compat.py",
            "def f():\n    from transformers.training_args import X",
            "config does not import transformers",
        ),
        (
            "trainer/a.py",
            "from transformers.trainer_callback import X",
            "submodules of transformers only in a file named compat.py",
        ),
        ("attic/a.py", "", "dstrain/attic/a.py:1: attic: no such room"),
        ("stray.py", "", "dstrain/stray.py:1: stray.py: every file lives in a room"),
    ],
)
def test_wrong_arrow_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    found = violations(house(tmp_path, {file: source}))
    assert len(found) == 1
    assert expected in found[0]


def test_right_arrows_are_left_alone(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from dstrain.trainer import Trainer",
        "core/a.py": "from .b import x\nfrom dstrain.core import b\ndef f():\n    import torch",
        "config/a.py": """
            from typing import TYPE_CHECKING
            from ..arguments import TrainingArguments
            if TYPE_CHECKING:
                import torch
            """,
        "arguments/compat.py": "def f():\n    from transformers.training_args import X",
        "engine/a.py": "import deepspeed\nimport torch\nfrom deepspeed.runtime import zero",
        "reporting/compat.py": "from transformers.trainer_callback import X",
        "trainer/a.py": "from transformers import X\nfrom dstrain.checkpoint.commit import y",
        "tasks/causal_lm/a.py": "from .loss import x\nfrom dstrain.tasks.causal_lm import loss",
        "tasks/seq2seq/a.py": "from dstrain.tasks.common.b import x\nfrom ..common import b",
        "tasks/registry.py": "from . import causal_lm, seq2seq\nimport dstrain.trainer",
        "cli/a.py": "from dstrain import __version__, tasks\ndef f():\n    import torch",
    }
    assert violations(house(tmp_path, files)) == []
