"""Schema of an engine's record in a checkpoint, which ``EngineProgress.read`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Gt
from pydantic import AfterValidator, Strict

from dstrain.core.documents import Count, Integer, Number, Real, Text
from dstrain.engine.state.optimizer_state import STATIC

_GroupValue = Number | Text | None | tuple[Number | None, ...]


def _changes(name: str) -> str:
    """Return the name of an entry of a parameter group, if training may change the entry."""
    if name in STATIC:
        raise ValueError("it does not change during training")
    return name


GroupValues = Mapping[Annotated[str, Strict(), AfterValidator(_changes)], _GroupValue]


@dataclass(frozen=True)
class Counters:
    """Counters of steps and samples of a DeepSpeed engine."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    micro_steps: Count


@dataclass(frozen=True)
class LossScale:
    """State of DeepSpeed's loss scaler; stage 0 has one without ``cur_hysteresis``."""

    cur_scale: Annotated[Real, Gt(0)]
    cur_iter: Integer | None = None
    last_overflow_iter: Integer | None = None
    cur_hysteresis: Integer | None = None


@dataclass(frozen=True)
class BuffersFound:
    """Names of buffers that ``Buffers.found`` returns; old checkpoints lack ``reshaped``."""

    state: list[Text]
    varying: list[Text]
    reshaped: list[Text] = field(default_factory=list)


@dataclass(frozen=True)
class Begun:
    """Schedule and parameter groups of a run before its first step."""

    schedule: Any
    groups: list[GroupValues]


@dataclass(frozen=True)
class EngineRecord:
    """State of an engine except for its tensors.

    Attributes:
        counters: numbers of steps and samples.
        loss_scale: the loss scale; None without fp16.
        groups: values of each parameter group that change during training.
        schedule: ``state_dict`` of the schedule, of any structure; None without a schedule.
        optimizer: class name of the optimizer.
        rates: learning rates that the schedule set last.
        begun: schedule and groups before the first step.
        buffers: names of the buffers that training changes.
    """

    counters: Counters
    loss_scale: LossScale | None
    groups: list[GroupValues]
    schedule: Any
    optimizer: Text = ""
    rates: list[Real] | None = None
    begun: Begun | None = None
    buffers: BuffersFound | None = None
