"""``dstrain train TASK``: hands the flags to the task."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from dstrain.core.errors import ConfigError, Problem, nearest

# Modules with ``argument_classes()`` (no torch) and ``run(*instances)``.
TASKS = {"causal-lm": "dstrain.tasks.causal_lm", "seq2seq": "dstrain.tasks.seq2seq"}


def run(words: Sequence[str]) -> int:
    """Parse the task's flags and run it.

    Raises:
        ConfigError: no or an unknown task, unknown or illegal flags.
    """
    if not words:
        raise ConfigError(
            Problem(
                "no task is named",
                f"tasks are {', '.join(TASKS)}",
                f"for example: dstrain train {next(iter(TASKS))} --output_dir out",
            )
        )
    if words[0] in ("-h", "--help"):
        print(f"usage: dstrain train TASK [flags]\n\ntasks: {', '.join(TASKS)}")
        print("`dstrain train TASK --help` lists the flags of a task.")
        return 0
    name, rest = words[0], words[1:]
    task = find_task(name)
    from dstrain.cli.flags import make_parser, parse

    classes = task.argument_classes()
    parser = make_parser(f"dstrain train {name}", task.__doc__ or "", classes)
    _, instances = parse(parser, rest, classes)
    task.run(*instances)
    return 0


def find_task(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        close = nearest(name, set(TASKS))
        raise ConfigError(
            Problem(
                f"unknown task {name!r}",
                f"tasks are {', '.join(TASKS)}",
                f"did you mean {close!r}?" if close else "",
            )
        )
    return importlib.import_module(TASKS[name])
