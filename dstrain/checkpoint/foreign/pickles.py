"""Reading ``.pt`` files of other programs without executing what is in them.

A pickle is a program. torch's weights-only loader runs none of it but the building of tensors and
plain values; the few classes of DeepSpeed that its checkpoints hold become inert values of our own
here, so that not even DeepSpeed has to be imported.
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

# How torch's loader names what it refuses.
_NAMED = re.compile(r"(?:GLOBAL|class|function) ([\w.]+) (?:was not an allowed|whose module)")


class Record:
    """Stands in for an object of DeepSpeed: its attributes, and none of its behaviour."""


class Number(int):
    """Stands in for an enumeration of DeepSpeed."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


def _stage_named(cls: Any, name: Any) -> Number:
    """Make the enumeration member that Python 3.11.0 to 3.11.3 store as a call of ``getattr``.

    Raises:
        UnpicklingError: for any other use of it.
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
        CheckpointError: it cannot be read, or only by executing what is in it.
    """
    if foreign := _foreign_classes(path):
        raise _needs_execution(path, foreign)
    # Each class once more for every name: torch looks a name up and then checks the class.
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
        return []  # of an old torch: the loader itself refuses what it does not know
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        return []  # loading it will say what is wrong
    return sorted(set(found) - set(_STAND_INS))
