"""Reading of ``.pt`` files of other programs without executing code in them.

A pickle is a program. torch's weights-only loader runs only the parts that build tensors and plain
values; the few classes of DeepSpeed in its checkpoints are replaced by inert classes here, so that
DeepSpeed need not be imported.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem

# Matches the names of refused classes and functions in messages of torch's loader.
_NAMED = re.compile(r"(?:GLOBAL|class|function) ([\w.]+) (?:was not an allowed|whose module)")


class Record:
    """Inert replacement for an object of DeepSpeed, with its attributes but no behaviour."""


class Number(int):
    """Inert replacement for a member of an enumeration of DeepSpeed."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


def _stage_named(cls: Any, name: Any) -> Number:
    """Return the member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as ``getattr``.

    Raises:
        UnpicklingError: ``getattr`` is called for anything else.
    """
    if cls is not Number or name not in _STAGES:
        raise pickle.UnpicklingError("function builtins.getattr was not an allowed one here")
    return Number(_STAGES[name])


_STAND_INS: dict[str, Callable[..., Any]] = {
    "deepspeed.utils.tensor_fragment.fragment_address": Record,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Record,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Record,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Number,
    "builtins.getattr": _stage_named,
}


def load_pickle(path: Path) -> Any:
    """Load a file that ``torch.save`` wrote; its tensors stay in the file until they are read.

    Raises:
        CheckpointError: the file cannot be read, or only by executing code in it.
    """
    if foreign := _foreign_classes(path):
        raise _needs_execution(path, foreign)
    # A pair for every name, also of the same class: torch looks the name up, then the class.
    stand_ins: list[Any] = [(cls, name) for name, cls in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        if named := _NAMED.findall(str(error)):
            raise _needs_execution(path, named) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            Problem(f"{path} cannot be read", reason, "use another checkpoint")
        ) from error


def _needs_execution(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        Problem(
            f"{path} is not loaded",
            f"it holds objects of {', '.join(names)}, which only executing the file could build; "
            "dstrain reads tensors, plain values and DeepSpeed's own records",
            "save it again without them: in DeepSpeed leave them out of client_state",
        )
    )


def _foreign_classes(path: Path) -> list[str]:
    """List the classes in a file that torch and dstrain do not know; none if it is no archive."""
    if not zipfile.is_zipfile(path):
        return []  # written by an old torch: the loader itself refuses unknown classes
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        return []  # loading it raises the error for users
    return sorted(set(found) - set(_STAND_INS))
