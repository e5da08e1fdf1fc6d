"""Settings of a run, and the hooks that the training loop calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from dstrain.core.progress import Progress
from dstrain.training.accumulation import MicroStep
from dstrain.training.resume import Position

if TYPE_CHECKING:
    from transformers import TrainerControl


class Hooks(Protocol):
    """Declares the methods that the loop calls on its owner: steps, events, evaluation, saving."""

    def train_micro_batch(
        self, micro_step: MicroStep, num_targets: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch.

        Args:
            micro_step: the micro-batch, and its place in the optimizer step.
            num_targets: that its loss is a mean over, where user code is told.

        Returns:
            its mean loss, of shape (), or (parts,) where the loss has several parts.
        """
        ...

    def count_flos(self, inputs: object) -> None:
        """Count the floating-point operations of a micro-batch."""
        ...

    def store_flos(self) -> None:
        """Bring ``state.total_flos`` up to date; a collective."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Report the figures of a logging step."""
        ...

    def event(self, name: str) -> TrainerControl:
        """Tell callbacks of an event; return what they want done."""
        ...

    def evaluate_in_training(self) -> TrainerControl:
        """Evaluate because a callback asked for it; return what callbacks want done.

        Raises:
            EvaluationStopped: a signal ended it; all is as if it had not begun.
        """
        ...

    def check_state(self) -> None:
        """Check, after the first step, that its optimizer's state can be saved; a collective."""
        ...

    def save_in_training(self, position: Position) -> None:
        """Save a checkpoint because a callback asked for it."""
        ...


@dataclass(frozen=True)
class RunSettings:
    """Holds what is decided of a run before its first step.

    Attributes:
        max_steps: optimizer steps in all.
        steps_per_epoch: optimizer steps per epoch, None for a stream.
        accumulation: micro-batches per rank and full window.
        nan_loss: "stop" or "continue".
        filter_bad: leave NaN and infinite losses out of the logged mean.
        log_every: steps between logs, 0 when logging goes by other events.
        eval_on_start: evaluate once before the first step.
        saves: whether checkpoints may be written, so that random states must be kept.
        num_epochs: epochs after which the run ends, however many steps these had; None where steps
            alone count.
        empty_cache_steps: steps between two clearances of the device's memory cache; 0 for none.
    """

    max_steps: int
    steps_per_epoch: int | None
    accumulation: int
    nan_loss: str
    filter_bad: bool
    log_every: int
    eval_on_start: bool = False
    saves: bool = False
    empty_cache_steps: int = 0
    num_epochs: int | None = None

    def is_over(self, progress: Progress) -> bool:
        """Tell whether a run that has come this far has done all of its steps or epochs."""
        ends_by_epochs = self.num_epochs is not None and progress.epoch >= self.num_epochs
        return ends_by_epochs or progress.step >= self.max_steps

    def is_log_step(self, step: int, *, ends_epoch: bool) -> bool:
        """Tell whether a step will probably be logged.

        Args:
            step: of the run, counted from 1.
            ends_epoch: whether it is the last one of its epoch.
        """
        if self.log_every:
            return step % self.log_every == 0 or step in (1, self.max_steps)
        return ends_epoch

    def clears_cache(self, step: int) -> bool:
        """Tell whether the device's memory cache is cleared after a step."""
        return bool(self.empty_cache_steps) and step % self.empty_cache_steps == 0

    def epochs_done(self, progress: Progress, *, ends_epoch: bool) -> float:
        """Compute the epochs done; in a stream's, as transformers, ``max_steps`` count as one.

        Args:
            progress: of the run, this step included.
            ends_epoch: whether the step ended its epoch.
        """
        if self.steps_per_epoch is None:
            return progress.epoch + min(1.0, progress.steps_in_epoch / self.max_steps)
        if ends_epoch:
            return progress.epoch + 1.0
        # A stream may give more than it says.
        return progress.epoch + min(1.0, progress.steps_in_epoch / self.steps_per_epoch)
