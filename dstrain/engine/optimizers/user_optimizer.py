"""Checks of optimizers and schedules that the user has built."""

from __future__ import annotations

from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.config.optimizer_table import OPTIMIZERS, Optimizer
from dstrain.core.errors import ConfigError, Problem, raise_problems

_TORCH_MUON = Optimizer(
    "torch.optim.Muon",
    whole="it orthogonalises whole matrices; ZeRO stages 1 to 3 give the optimizer flat slices of "
    "many parameters joined together",
    instead="use optim='muon', DeepSpeed's own, which gathers them",
)
_SLICES = (
    "ZeRO gives it flat slices of many parameters joined together: a rule that treats each element "
    "alone is the same there, one that looks at a whole tensor is another"
)


def check_user_optimizer(optimizer: Any, scheduler: Any, resolved: ResolvedConfig) -> None:
    """Check that a user's optimizer and schedule can run under a config.

    Raises:
        ConfigError: the object is no optimizer, ZeRO would change what the optimizer computes, or
            the schedule belongs to another optimizer.
    """
    problems = []
    stage, offload = resolved.stage, resolved.optimizer_offload
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        why = "DeepSpeed takes a torch.optim.Optimizer"
        problems.append(Problem(f"optimizer of type {type(optimizer).__name__}", why))
    rows = [row for row in map(_row_of, type(optimizer).__mro__) if row is not None]
    row = rows[0] if rows else None
    what = f"your own {type(optimizer).__name__} with stage {stage}, optimizer offload {offload}"
    if row is not None and row.refused:
        problems.append(Problem(what, row.refused, row.instead))
    if row is not None and row.whole and stage > 0:
        problems.append(Problem(what, row.whole, f"{row.instead}, or set zero_stage to 0"))
    if row is not None and row.offload is None and offload != "none" and not problems:
        problems.append(Problem(what, row.no_offload, row.instead))
    steered = getattr(scheduler, "optimizer", None)
    if steered is not None and steered is not optimizer:
        problems.append(
            Problem(
                f"a schedule of type {type(scheduler).__name__} was passed",
                f"it steers a {type(steered).__name__} that is not the optimizer of this run",
                "pass the optimizer that it was made with, or override create_scheduler, which "
                "is given the optimizer",
            )
        )
    raise_problems(problems, error=ConfigError)


def slices_remark(optimizer: Any, resolved: ResolvedConfig) -> str:
    """Return a warning about what a user's optimizer computes on flat slices; "" for none."""
    row = None if optimizer is None else _row_of(type(optimizer))
    if optimizer is None or resolved.stage == 0 or (row is not None and not row.warning):
        return ""
    what = f"your own {type(optimizer).__name__} at ZeRO stage {resolved.stage}"
    return f"{what}: {_SLICES if row is None else row.warning}"


def _row_of(cls: type[Any]) -> Optimizer | None:
    """Return the entry of a class in the table of known optimizers, or None."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.startswith("torch.optim."):
        path = f"torch.optim.{cls.__name__}"
    if path == "torch.optim.Muon":
        return _TORCH_MUON
    for row in OPTIMIZERS:
        if any(b is not None and b.cls == path for b in (*row.builds, row.offload)):
            return row
    return None
