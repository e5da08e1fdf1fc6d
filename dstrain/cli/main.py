"""Entry point: runs a command, and turns each failure into a message and an exit status."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dstrain.core.errors import DstrainError
from dstrain.core.launcher import note_begin, note_end, watch_launchers
from dstrain.core.output import drop_what_cannot_be_written
from dstrain.core.secrets import hidden_in_text
from dstrain.core.stop import INCOMPLETE, PREEMPTED, Preempted

USAGE = """usage: dstrain COMMAND ...

commands:
  train TASK [flags]   train, evaluate and save a model; tasks: causal-lm, seq2seq
  explain [TASK] [flags]
                       print the DeepSpeed config that these flags resolve to, and why
  plan [flags]         print the memory that each ZeRO stage and offload needs, and what fits
  checkpoint ACTION    look after checkpoints: ls, verify, diff, export, convert, import, prune

Start on many processes with the launcher, for example
  deepspeed --num_gpus 8 --module dstrain train causal-lm --output_dir out
`dstrain COMMAND --help` lists the flags of a command.
"""

USER_ERROR = 2
FAILURE = 1

_GO_ON = "the same command with --resume_from_checkpoint auto goes on from there"

# Statuses with which all ranks end at the same time, so that none waits for another in vain. Not
# 128 + SIGINT, which may be a KeyboardInterrupt of one rank.
_UNSAVED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
_OF_ALL_RANKS = (0, PREEMPTED, INCOMPLETE, *_UNSAVED)

# Parts of errors by which gloo and NCCL report in a collective that a peer is gone.
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    The status is 0 for success, 1 for a failure, 2 for a mistake of the user, 3 for training that
    is done but whose last checkpoint could not be written, 75 for training that a signal ended
    early, and 128 + signal where that was before the first step, so that nothing is saved. Ranks
    that wait in vain for another rank end by themselves, with status 76.
    """
    words = [a for a in (sys.argv[1:] if argv is None else argv) if not _is_local_rank(a)]
    try:
        return _run(words)
    except DstrainError as error:
        return _report_user_error(error)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            go_on = f"; {_GO_ON}" if stop.is_saved else ""
            print(f"\ndstrain: {stop.message}{go_on}", file=sys.stderr, flush=True)
        return stop.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError as error:
        if words[:1] == ["train"]:  # from another pipe or socket: prints of training never raise it
            return _report_failure(error)
        # The reader of the output has ended, as in `dstrain explain | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report_failure(error)


def entry() -> NoReturn:
    """Run ``main`` as a console script, shut down the process group, and end the process."""
    status = main()
    note_end(status)
    if status in _OF_ALL_RANKS and "torch" in sys.modules:
        from dstrain.engine import shut_down

        shut_down()
        _end(status)
    sys.exit(status)


def _end(status: int) -> NoReturn:
    """End the process as Python does, but without running destructors of C++ libraries.

    In these destructors, threads of gloo that outlive their owner sometimes abort a training
    command that is done ("terminate called without an active exception").
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _run(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from dstrain import __version__

        print(__version__)
        return 0
    if command == "train":
        from dstrain.cli import train

        drop_what_cannot_be_written()
        note_begin()
        watch_launchers()
        return train.run(rest)
    if command == "explain":
        from dstrain.cli import explain

        return explain.run(rest)
    if command == "plan":
        from dstrain.cli import plan

        return plan.run(rest)
    if command == "checkpoint":
        from dstrain.cli import checkpoint

        return checkpoint.run(rest)
    from dstrain.core.errors import ConfigError, Problem, nearest

    close = nearest(command, {"train", "explain", "plan", "checkpoint"})
    raise ConfigError(
        Problem(
            f"unknown command {command!r}",
            "",
            f"did you mean {close!r}?" if close else "see dstrain --help",
        )
    )


def _report_user_error(error: DstrainError) -> int:
    """Print a mistake of the user; return the exit status.

    All ranks usually find the same mistake, so that other ranks let rank 0 print it first.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # If rank 0 finds the same mistake it ends meanwhile, and the launcher ends this rank.
        time.sleep(5)
        print(f"[rank {rank}] {error}", file=sys.stderr, flush=True)
    else:
        print(f"\ndstrain: error: {error}", file=sys.stderr, flush=True)
    return _leave(USER_ERROR)


def _report_failure(error: Exception) -> int:
    """Print this rank's traceback and end at once, so that the launcher ends all other ranks."""
    rank = os.environ.get("RANK", "0")
    reason = next(iter(str(error).strip().splitlines()), "")
    if any(sign in reason for sign in LOST_RANK):
        # Another rank has failed before: this traceback would hide that of the cause.
        text = f"ended, because another rank did; the cause is what that rank shows ({reason})"
    else:
        text = f"failed:\n{traceback.format_exc()}"
    print(f"\n[rank {rank}] {hidden_in_text(text)}", file=sys.stderr, flush=True)
    return _leave(FAILURE)


def _leave(status: int) -> int:
    """End the process without clean-up if there are several ranks; else return the status.

    Clean-up could wait for other ranks, which may wait for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        note_end(status)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)
    return status


def _is_local_rank(word: str) -> bool:
    return word.startswith(("--local_rank=", "--local-rank="))
