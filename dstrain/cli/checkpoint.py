"""Command ``dstrain checkpoint ACTION``: list, verify, write and remove checkpoints of a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.cli import checkpoint_look as look
from dstrain.cli import checkpoint_make as make
from dstrain.cli.flags import make_parser
from dstrain.core.errors import CheckpointError, ConfigError, Problem, nearest
from dstrain.core.files import told_refused


@dataclass(frozen=True)
class _Action:
    """Action of ``dstrain checkpoint``, such as ``ls``.

    Attributes:
        usage: arguments of the action, as in the help.
        text: description of the action.
        run: function that carries the action out and returns the exit status.
        flags: function that adds the arguments of the action to a parser.
    """

    usage: str
    text: str
    run: Callable[[argparse.Namespace], int]
    flags: Callable[[argparse.ArgumentParser], None]


@told_refused(CheckpointError)
def run(words: Sequence[str]) -> int:
    """Run one action; return 1 if ``verify`` finds damage or ``diff`` a difference, else 0.

    Raises:
        ConfigError: the action or a flag is unknown.
        CheckpointError: a path holds no checkpoint, or the system refuses access to it.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0
    name, rest = words[0], list(words[1:])
    if name not in _ACTIONS:
        close = nearest(name, set(_ACTIONS))
        raise ConfigError(
            Problem(
                f"unknown action {name!r}",
                f"actions are {', '.join(_ACTIONS)}",
                f"did you mean {close!r}?" if close else "",
            )
        )
    if any(not word.strip() for word in rest):
        raise ConfigError(
            Problem(
                f"dstrain checkpoint {name} with an empty argument",
                "as a path it would be the current folder",
                "is a shell variable empty?",
            )
        )
    action = _ACTIONS[name]
    parser = make_parser(f"dstrain checkpoint {name}", action.text, [])
    parser.usage = f"%(prog)s {action.usage}"
    action.flags(parser)
    return action.run(parser.parse_args(rest))


def _usage() -> str:
    heads = [f"{name} {action.usage}" for name, action in _ACTIONS.items()]
    width = max(map(len, heads)) + 2
    lines = [f"  {h:<{width}}{a.text}" for h, a in zip(heads, _ACTIONS.values(), strict=True)]
    return "\n".join(["usage: dstrain checkpoint ACTION ...", "", "actions:", *lines, ""])


def _dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, help="a run's output_dir, or one checkpoint of it")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    _dir(parser)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; as trained if left out")
    parser.add_argument("--max_shard_bytes", type=int, default=5 * 10**9, help="of one weight file")


def _diff_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="a checkpoint, or a run, whose newest is taken")
    parser.add_argument("second", type=Path, help="the checkpoint or run to compare it with")
    parser.add_argument("--all", action="store_true", default=False, help="list every tensor")


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    _dir(parser)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--to", choices=("deepspeed",), required=True, help="the format to write")


def _import_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder of DeepSpeed or transformers")
    parser.add_argument("out", type=Path, help="checkpoint to make, such as out/checkpoint-500")
    parser.add_argument(
        "--samples_per_epoch",
        type=int,
        default=None,
        help="size of the training data, where the folder does not tell how far an epoch was",
    )
    parser.add_argument(
        "--global_batch_size",
        type=int,
        default=None,
        help="samples per optimizer step, where the folder does not tell",
    )


def _prune_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, help="a run's output_dir")
    parser.add_argument("--keep", type=int, required=True, help="how many checkpoints to leave")
    parser.add_argument(
        "--dry_run", action="store_true", default=False, help="only say what would be removed"
    )


_ACTIONS = {
    "ls": _Action("DIR", "step, metrics and size of every checkpoint of a run", look.ls, _dir),
    "verify": _Action(
        "DIR", "read every file of a checkpoint, or of all of a run", look.verify, _dir
    ),
    "diff": _Action("A B [--all]", "what differs between two checkpoints", look.diff, _diff_flags),
    "export": _Action(
        "DIR OUT [--dtype D]",
        "the model of a checkpoint as a Hugging Face folder",
        make.export,
        _export_flags,
    ),
    "convert": _Action(
        "DIR OUT --to deepspeed",
        "a checkpoint as a folder that DeepSpeed loads (universal format)",
        make.convert,
        _convert_flags,
    ),
    "import": _Action(
        "SRC OUT",
        "a checkpoint of DeepSpeed or transformers as one of dstrain",
        make.import_checkpoint,
        _import_flags,
    ),
    "prune": _Action(
        "DIR --keep N [--dry_run]",
        "remove old checkpoints, never the newest or the best",
        make.prune,
        _prune_flags,
    ),
}
