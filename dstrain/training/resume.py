"""Describing where a run stands between two steps, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import MinLen
from pydantic import AfterValidator, AllowInfNan, ConfigDict, with_config

from dstrain.checkpoint import is_plain
from dstrain.core.documents import AtLeastOne, Count, Flag, Number, Plain, Real, Text, typed
from dstrain.core.progress import Progress
from dstrain.core.seeds import check_random_state, random_state, set_random_state
from dstrain.data import LossFindings
from dstrain.training.types import PlainState

if TYPE_CHECKING:
    from transformers import TrainerControl


@dataclass(frozen=True)
class _MeterRecord:
    """Describes the sums of a rank's meter since it was last read."""

    loss: Real
    finite: Annotated[Real, AllowInfNan(False)]
    bad: Annotated[Real, AllowInfNan(False)]
    steps: Count
    tokens: Count
    seconds: Real


def _check_meter(values: PlainState) -> PlainState:
    typed(values, _MeterRecord)
    return values


def _check_random(state: Plain) -> Plain:
    check_random_state(state)
    return state


Event = Literal["on_step_end", "on_epoch_end"]
"""A point of the run at which callbacks decide whether to log, evaluate and save."""


@dataclass(frozen=True)
class StepRecord:
    """Holds the result of one optimizer step, for logs and checkpoints.

    Attributes:
        applied: False where gradients were not finite, so that the weights stayed as they were.
        grad_norm: global gradient norm before clipping; None where it was not computed.
        learning_rate: learning rate of the first parameter group.
    """

    applied: bool
    grad_norm: torch.Tensor | float | None
    learning_rate: float


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class PendingEvaluation:
    """Describes an evaluation that a signal ended, and what was to follow at that point.

    Attributes:
        event: "on_step_end" or "on_epoch_end"; callbacks have been told of it.
        saves: whether to save after the evaluation, whatever that finds.
        stops_training: whether a callback had ended the run.
        stops_epoch: whether a callback had ended the epoch.
    """

    event: Event
    saves: Flag
    stops_training: Flag
    stops_epoch: Flag

    @staticmethod
    def of(event: Event, control: TrainerControl) -> PendingEvaluation:
        """Record what callbacks have decided in ``event``, before the evaluation."""
        return PendingEvaluation(
            event, control.should_save, control.should_training_stop, control.should_epoch_stop
        )

    def restore_decisions(self, control: TrainerControl) -> None:
        """Set these decisions in ``control`` again."""
        control.should_evaluate = True
        control.should_save = self.saves
        control.should_training_stop = self.stops_training
        control.should_epoch_stop = self.stops_epoch


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Position:
    """Holds what the loop needs to go on as if it had never stopped.

    Attributes:
        progress: steps and samples; of the next epoch where this one's end has been handled.
        epoch_is_over: the epoch's samples are used up, and only its end is still to be handled.
        applied: whether the last step changed the weights.
        grad_norm: of the last step, where it was computed.
        learning_rate: of the last step.
        skipped_steps: of the whole run.
        loss_sum: over all steps that were read from the meter.
        samples_seen: over all ranks.
        meters: what the meter of each rank has added since it was last read.
        random_ahead: this rank's random state before it fetched the first micro-batch of the next
            window; None where it has fetched none.
        source: state of the stream behind the loader after the epoch's samples so far; None where
            there is none, and those samples must be read again. Of this rank's part, where each
            has one of its own.
        shares: in how many parts the data came: as many as ranks where the user had split it by
            rank, else 1; None where a checkpoint does not say.
        due: the evaluation that a signal ended at this very point; None for most positions.
        loss: what has been found out about what the loss is a mean over; None where nothing was to
            be found out.
        stopped: whether a callback had ended the run, and a signal came when all was done but what
            follows the last step; such a run has no further step.
    """

    progress: Progress
    epoch_is_over: Flag
    applied: Flag
    grad_norm: Number | None
    learning_rate: Number
    skipped_steps: Count
    loss_sum: Number
    samples_seen: Count
    meters: Annotated[list[Annotated[PlainState, AfterValidator(_check_meter)]], MinLen(1)]
    random_ahead: PlainState | None = None
    source: dict[Text, Any] | None = None
    shares: AtLeastOne | None = None
    due: PendingEvaluation | None = None
    loss: LossFindings | None = None
    stopped: Flag = False

    def shared(self) -> PlainState:
        """Return the part that is the same on all ranks, as plain values."""
        values = asdict(replace(self, random_ahead=None, source=None))
        del values["random_ahead"]
        source = None if self.is_split else self.source
        return values | {"source": source if is_plain(source) else None}

    def rank_state(self) -> PlainState:
        """Return this rank's part: its random state now, and before what it has fetched ahead.

        And the state of its own part of the data, where it has one.
        """
        state: PlainState = {"random": random_state(), "random_ahead": self.random_ahead}
        if self.is_split and self.source is not None and is_plain(self.source):
            state["source"] = self.source
        return state

    @property
    def is_split(self) -> bool:
        """Return whether each rank has a part of the data of its own."""
        return (self.shares or 1) > 1

    @property
    def is_inside_epoch(self) -> bool:
        """Tell whether some samples of an epoch have been used and others are still to come."""
        return bool(self.progress.samples_in_epoch) and not self.epoch_is_over

    @staticmethod
    def of(shared: Mapping[str, object]) -> Position:
        """Rebuild the position from which ``shared`` was made.

        Raises:
            ValueError: naming what in it is none of a position.
        """
        return typed({**shared, "random_ahead": None}, Position)


@dataclass(frozen=True)
class RankRecord:
    """Describes this rank's own part of a checkpoint: the values of ``Position.rank_state``."""

    random: Annotated[Plain, AfterValidator(_check_random)]
    random_ahead: Annotated[Plain, AfterValidator(_check_random)] | None = None
    source: Plain | None = None


@dataclass(frozen=True)
class Resumption:
    """Holds what a run resumes from.

    Attributes:
        position: the position in the checkpoint.
        rank_state: this rank's part of the checkpoint; None where other ranks wrote it, and the
            random state has been derived anew.
    """

    position: Position
    rank_state: PlainState | None

    @property
    def random_ahead(self) -> PlainState | None:
        """Return the random state before what was fetched ahead of the checkpoint, or None."""
        return None if self.rank_state is None else self.rank_state["random_ahead"]

    def restore_random_ahead(self) -> None:
        """Restore the random state in which the first micro-batch had been fetched."""
        if self.random_ahead is not None:
            set_random_state(self.random_ahead)

    def restore_random(self) -> None:
        """Restore the random state of the checkpoint."""
        if self.rank_state is not None:
            set_random_state(self.rank_state["random"])
