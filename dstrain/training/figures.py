"""Counting and judging the losses of a run without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, gather_objects
from dstrain.data import Window
from dstrain.engine import device_name
from dstrain.training.accumulation import Accumulated
from dstrain.training.loss_health import LossHealth
from dstrain.training.metrics import Reading, TrainMeter
from dstrain.training.resume import Position, StepRecord
from dstrain.training.settings import RunSettings
from dstrain.training.types import PlainState

logger = get_logger(__name__)


class RunFigures:
    """Counts steps, samples and losses of a run.

    Attributes:
        skipped_steps: steps of the whole run whose gradients were not finite.
        loss_sum: sum of the losses of all steps that were read from the meter.
        samples_seen: samples over all ranks in the whole run.
        rank_samples: samples of this rank since the run began or resumed.
        health: judges losses.
    """

    def __init__(self, settings: RunSettings, ranks: Ranks) -> None:
        """Begin at zero.

        Args:
            settings: the settings of the run.
            ranks: rank and world size of this process.
        """
        self.skipped_steps = self.samples_seen = self.rank_samples = 0
        self.loss_sum = 0.0
        self.health = LossHealth(ranks, nan_loss=settings.nan_loss, max_steps=settings.max_steps)
        self._ranks = ranks
        self._meter = TrainMeter(device_name(), filter_bad=settings.filter_bad)

    def start(self) -> None:
        """Count time from here on."""
        self._meter.start()

    def restore(self, position: Position) -> None:
        """Go on from a checkpoint's figures."""
        self.skipped_steps, self.loss_sum = position.skipped_steps, position.loss_sum
        self.samples_seen = position.samples_seen
        ranks = self._ranks
        self._meter.restore(position.meters, rank=ranks.rank, world_size=ranks.world_size)

    def meters(self) -> list[PlainState]:
        """Return what the meter of each rank has added since the last reading; a collective."""
        return gather_objects(self._meter.state())

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the time of a block (an evaluation, a save) out of the training speed."""
        started = time.perf_counter()
        yield
        self._meter.exclude(time.perf_counter() - started)

    def add(self, window: Window, passes: Accumulated, *, step: int) -> None:
        """Add a step that was taken; nothing is read from the device.

        Args:
            window: the micro-batches of this rank.
            passes: results of their passes.
            step: the step's number in the run.
        """
        self.samples_seen += window.num_samples
        self.rank_samples += sum(m.num_samples for m in window.micro_batches)
        self._meter.add(
            passes.losses,
            passes.weights.counts,
            passes.weights.totals,
            step=step,
            num_tokens=passes.num_tokens,
            empty=passes.empty_columns,
        )

    def read(self) -> Reading:
        """Read the meter: the one wait for the device; a collective of all ranks."""
        return self._meter.read()

    def note(self, reading: Reading, *, step: int) -> None:
        """Update the totals, and act on a loss that is not finite.

        Args:
            reading: a reading of the meter.
            step: the step that the run has come to.

        Raises:
            TrainingError: a loss is no number, and ``nan_loss`` is "stop"; on all ranks.
        """
        self.loss_sum += reading.loss_sum
        if reading.first_bad_step is None:
            return
        self.health.report_bad_number(
            f"the training loss was NaN or infinite at step {reading.first_bad_step}",
            f"seen when step {step} was logged; what was trained since may be spoilt",
            reading.empty_columns,
        )

    def note_skipped(
        self, empty_columns: frozenset[str], *, step: int, loss_scale: float | None
    ) -> None:
        """Count a step that changed nothing, as fp16 takes to find its loss scale.

        Args:
            empty_columns: label columns of this rank without a target in the step.
            step: the step that was skipped.
            loss_scale: the engine's loss scale; None where it has none.

        Raises:
            TrainingError: there is no loss scale, and ``nan_loss`` is "stop"; on all ranks.
        """
        self.skipped_steps += 1
        what = f"step {step} skipped: its gradients were not finite"
        if loss_scale is None:
            why = "no loss scale will be lowered: the next steps may be no better"
            names = {name for of_rank in gather_objects(empty_columns) for name in of_rank}
            self.health.report_bad_number(what, why, names)
        elif self._ranks.is_main:
            logger.warning("%s", what)

    def logs(
        self, reading: Reading, last: StepRecord, *, loss_scale: float | None
    ) -> dict[str, float]:
        """Return the figures of a logging step."""
        logs: dict[str, float] = {"loss": reading.loss}
        if last.grad_norm is not None and last.applied:
            logs["grad_norm"] = float(last.grad_norm)
        logs["learning_rate"] = last.learning_rate
        if loss_scale is not None:
            logs["loss_scale"] = loss_scale
            logs["skipped_steps"] = self.skipped_steps
        logs["tokens_per_second"] = reading.num_tokens / max(reading.seconds, 1e-9)
        return logs
