"""Command ``dstrain explain``: print the config that flags resolve to, and why; without torch.

``dstrain explain TASK [flags]`` takes every flag of ``dstrain train TASK``: write "explain" in
place of "train" in the command of a run to explain its config.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.cli.flags import make_parser, parse
from dstrain.cli.model import count_in_child, local_folder
from dstrain.cli.train import TASKS, find_task
from dstrain.config import Facts, Machine, ResolvedConfig, resolve
from dstrain.config.difference import as_data, as_text, differences, read_record
from dstrain.config.explain import as_record, as_table
from dstrain.config.memory.closed_forms import sizes_of
from dstrain.config.memory.placement import parse_size
from dstrain.config.memory.sizes import ModelSizes
from dstrain.core.errors import ConfigError, Problem, collected, raise_errors, raise_problems

CLASSES = [TrainingArguments]
MODELS = ("model_config", "model_name_or_path")
SHARED = (
    *(*MODELS, "block_size", "world_size", "device"),
    *("gpus_per_node", "gpu_memory", "host_memory"),
)
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "model_config": {"metavar": "SPEC", "help": "config.json, or llama:key=value,..."},
    "model_name_or_path": {"metavar": "FOLDER", "help": "a local model folder"},
    "block_size": {"metavar": "TOKENS", "type": int, "help": "tokens of one sample"},
}
OPTIONAL = (*SHARED, "diff")
SAME, DIFFERENT = 0, 1
"""Exit statuses of ``--diff``, as those of diff(1)."""


def run(words: Sequence[str]) -> int:
    """Print the resolved config, or with ``--diff`` its differences from another one.

    Returns:
        the exit status: 1 for a ``--diff`` with differences, else 0.

    Raises:
        ConfigError: the flags are wrong; training with them raises the same error.
        ModelError: the model config cannot be read.
    """
    options, arguments = _parse(words)
    resolved = _resolve(options, arguments)
    if options.diff is None:
        record = as_record(resolved, arguments)
        print(json.dumps(record, indent=2) if options.json else as_table(resolved))
        if not options.json and (note := _unsaid(resolved)):
            print(f"note: {note}")
        return SAME
    found = differences(as_record(resolved, arguments), _other(options, words))
    if options.json:
        print(json.dumps(as_data(found), indent=2))
    else:
        print(as_text(found, other=options.diff))
    return DIFFERENT if found else SAME


def _unsaid(resolved: ResolvedConfig) -> str:
    """Return a note that names flags for facts which only a run knows; "" if all are given."""
    facts = resolved.facts
    unknown = {"--model_config": facts.sizes is None}
    if resolved.provenance["zero_optimization.stage"].source == "derived":
        memory = "--host_memory" if facts.device == "cpu" else "--gpu_memory"
        unknown |= {memory: facts.machine is None, "--block_size": facts.sequence_length is None}
    flags = [flag for flag, is_unknown in unknown.items() if is_unknown]
    return f"a run knows more than this command: tell it with {', '.join(flags)}" if flags else ""


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, TrainingArguments]:
    """Parse flags of the command, of the model and of the world, and the training arguments."""
    words = list(words)
    if words[:1] == ["train"]:
        del words[0]
    task = words.pop(0) if words and not words[0].startswith("-") else None
    classes = find_task(task).argument_classes() if task else CLASSES
    parser = make_parser(
        " ".join(filter(None, ["dstrain explain", task])),
        "Print the DeepSpeed config that training with these flags would use, and why. "
        f"After the name of a task ({', '.join(TASKS)}) it takes that task's flags too.",
        classes,
    )
    own = {field.name for cls in classes for field in dataclasses.fields(cls)}
    model = parser.add_argument_group("The model to explain for")
    for name, options in MODEL_FLAGS.items():
        if name not in own:
            model.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
    world = parser.add_argument_group("The world to explain for")
    world.add_argument("--world_size", type=int, default=1, help="ranks over all machines")
    world.add_argument("--device", default="cuda", help="cuda or cpu")
    world.add_argument("--gpus_per_node", type=int, default=8, help="of one machine")
    world.add_argument(
        "--gpu_memory", default=argparse.SUPPRESS, metavar="SIZE", help="of one GPU, such as 80GB"
    )
    world.add_argument(
        "--host_memory",
        default=argparse.SUPPRESS,
        metavar="SIZE",
        help="of one machine, such as 1TB",
    )
    parser.add_argument(
        "--diff",
        default=argparse.SUPPRESS,
        metavar="OTHER",
        help="show what differs from another run: its output_dir or resolved_config.json, a "
        "DeepSpeed config (with the same other flags), or flags in quotes; the exit status is 0 "
        "where nothing differs, 1 where something does",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    given, instances = parse(parser, _joined(words), classes, of_other_commands=_of_tasks())
    arguments = next(found for found in instances if isinstance(found, TrainingArguments))
    of_task = {
        n: getattr(found, n) for found in instances for n in MODEL_FLAGS if hasattr(found, n)
    }
    options = {**dict.fromkeys(OPTIONAL), **of_task, **vars(given), "task": task}
    return argparse.Namespace(**options), arguments


def _joined(words: list[str]) -> list[str]:
    """Join ``--diff`` and the word after it by "="; argparse would take that word for a flag."""
    if "--diff" not in words[:-1]:
        return words
    i = words.index("--diff")
    return [*words[:i], f"--diff={words[i + 1]}", *words[i + 2 :]]


def _of_tasks() -> dict[str, str]:
    """Return flag of a task -> remedy that names the command which takes the flag."""
    having: dict[str, list[str]] = {}
    for task in TASKS:
        for cls in find_task(task).argument_classes():
            for field in dataclasses.fields(cls):
                having.setdefault(f"--{field.name}", []).append(task)
    return {
        flag: f"it belongs to a task: dstrain explain {' or '.join(tasks)} [flags]"
        for flag, tasks in having.items()
    }


def _other(options: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Return the record of the run that ``--diff`` names: by a folder, a file, or flags.

    Raises:
        ConfigError: the value of ``--diff`` cannot be read, or its config cannot be resolved.
    """
    given = options.diff.strip()
    if not given:
        raise ConfigError(
            Problem(
                "--diff is empty",
                "it names no run to compare with",
                "name one, or for the defaults any flag at its default, such as "
                "--diff '--seed 42'; is a shell variable empty?",
            )
        )
    if given.startswith("-"):
        # Its flags are complete but for model and world, which are taken over if it names none.
        try:
            own = shlex.split(given)
        except ValueError as error:
            raise ConfigError(
                Problem(f"--diff {given!r}", str(error)), title="the run to compare with"
            ) from error
        flags = {word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in own}
        names = [n for n in SHARED if getattr(options, n) is not None]
        if flags & {f"--{name}" for name in MODELS}:  # a model named there replaces this one
            names = [n for n in names if n not in MODELS]
        kept = [f"--{name}={getattr(options, name)}" for name in names]
        return _record([*([options.task] if options.task else []), *kept, *own])
    record = read_record(given)
    if record is None:
        record = _record([*words, f"--deepspeed={given}"])
    return record


def _record(words: Sequence[str]) -> dict[str, Any]:
    try:
        options, arguments = _parse(words)
        return as_record(_resolve(options, arguments), arguments)
    except ConfigError as error:
        raise ConfigError(error.problems, title="the run to compare with") from error


def _resolve(options: argparse.Namespace, arguments: TrainingArguments) -> ResolvedConfig:
    """Resolve the arguments for the model and the world that the flags describe."""
    _check(options)
    sizes = _sizes(options)
    facts = Facts(
        world_size=options.world_size,
        device=options.device,
        num_training_steps=arguments.max_steps if arguments.max_steps > 0 else None,
        model=None if sizes is None else sizes.facts,
        sizes=sizes,
        machine=_machine(options),
        sequence_length=options.block_size,
    )
    return resolve(arguments, facts)


def _check(options: argparse.Namespace) -> None:
    problems = [
        Problem(f"--{name} {value}", "at least one")
        for name in ("world_size", "gpus_per_node", "block_size")
        if (value := getattr(options, name)) is not None and value < 1
    ]
    if options.model_config is not None and options.model_name_or_path is not None:
        problems.append(
            Problem(
                "--model_config and --model_name_or_path",
                "both describe the model",
                "give one of them",
            )
        )
    if options.device == "cpu" and options.gpu_memory is not None:
        problems.append(
            Problem("--gpu_memory with --device cpu", "", "give --host_memory of one machine")
        )
    raise_problems(problems, error=ConfigError)


def _sizes(options: argparse.Namespace) -> ModelSizes | None:
    if options.model_config is not None:
        return sizes_of(options.model_config, count_in_child)
    if options.model_name_or_path is not None:
        return sizes_of(local_folder(options.model_name_or_path), count_in_child)
    return None


def _machine(options: argparse.Namespace) -> Machine | None:
    """Return the machine with the memory that flags give; None without a rank's memory."""
    errors: list[Any] = []
    sizes: dict[str, int] = {}
    for name in ("gpu_memory", "host_memory"):
        if (text := getattr(options, name)) is not None:
            with collected(errors):
                sizes[name] = parse_size(text, name)
    raise_errors(errors)
    ranks = min(options.world_size, options.gpus_per_node)
    host = sizes.get("host_memory")
    if options.device == "cpu":
        return None if host is None else Machine(ranks, host // ranks, host)
    return Machine(ranks, sizes["gpu_memory"], host) if "gpu_memory" in sizes else None
