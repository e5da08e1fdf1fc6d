"""Command ``dstrain train TASK``: parse the flags of a task, and run it."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from types import ModuleType

from dstrain.core.errors import ConfigError, Problem, nearest, raise_problems
from dstrain.core.secret_names import is_secret_name
from dstrain.core.secrets import hidden_in_words

# Modules with ``argument_classes()`` (no torch) and ``run(*instances)``.
TASKS = {"causal-lm": "dstrain.tasks.causal_lm", "seq2seq": "dstrain.tasks.seq2seq"}


# Beginnings of values that can contain a credential: JSON, plain or in base64, and addresses.
_SETTINGS = re.compile(r"\{|e[yw3]|[A-Za-z][A-Za-z0-9+.\-]*:/")


def run(words: Sequence[str]) -> int:
    """Parse the flags of a task and run it; return the exit status.

    Raises:
        ConfigError: no task or an unknown one is named, flags are wrong, or a launcher has started
            this process with a credential among the flags.
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
    if "RANK" in os.environ:
        _refuse_credentials(rest)
    task = find_task(name)
    from dstrain.cli.flags import make_parser, parse

    classes = task.argument_classes()
    parser = make_parser(f"dstrain train {name}", task.__doc__ or "", classes)
    _, instances = parse(parser, rest, classes)
    status: int = task.run(*instances)
    return status


def _refuse_credentials(words: Sequence[str]) -> None:
    """Refuse credentials in the command of a launcher, which prints it, and every user can read.

    Raises:
        ConfigError: a word of the command is, or contains, a credential.
    """
    problems = []
    for i, (word, shown) in enumerate(zip(words, hidden_in_words(words), strict=True)):
        if word == shown:
            continue
        flag, equals, value = word.partition("=")
        if not (word.startswith("--") and equals):
            flag, value = (words[i - 1] if i else ""), word
        if not is_secret_name(flag) and not _SETTINGS.match(value.lstrip()):
            continue  # prose, such as a prompt
        remedy = "put it into a file that only you can read, and give the path of that"
        if flag.replace("-", "_").endswith("hub_token"):
            remedy = f"leave {flag} out: `export HF_TOKEN=...` before the launch, or log in once "
            remedy += "with `hf auth login`, on the machine of rank 0"
        problems.append(
            Problem(
                f"{flag} with a credential on the command line of a launcher",
                "the launcher prints its command, in its log and when a run fails, and every user "
                "of the machine can read it: take the credential for known, and replace it",
                remedy,
            )
        )
    raise_problems(problems, error=ConfigError)


def find_task(name: str) -> ModuleType:
    """Import the module of a task.

    Raises:
        ConfigError: no task has this name.
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
