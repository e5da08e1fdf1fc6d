"""What the training loop is given: a run's plan, the trainer's hooks, facts of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dstrain.trainer.position import Position
from dstrain.trainer.window_weights import WindowWeights


class Hooks(Protocol):
    """What the loop calls on the trainer: its overridable steps, its events, its evaluation."""

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch; return its mean loss."""
        ...

    def count_flos(self, inputs: Any) -> None:
        """Count the floating-point operations of a micro-batch."""
        ...

    def store_flos(self) -> None:
        """Bring ``state.total_flos`` up to date; a collective."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Report the figures of a logging step."""
        ...

    def event(self, name: str, **kwargs: Any) -> Any:
        """Tell callbacks of an event; returns the control object."""
        ...

    def evaluate_in_training(self) -> Any:
        """Evaluate because a callback asked for it; returns the control object.

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
class RunPlan:
    """What a run is made of.

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


@dataclass
class MicroStep:
    """What ``training_step`` needs to know beyond its arguments.

    Attributes:
        weights: of the micro-batches of the window; None outside of a step.
        index: of the micro-batch in the window.
        last: whether the micro-batch ends the accumulation window.
        num_samples: samples of the micro-batch, where they are known.
        inputs: the micro-batch as the loader gave it, in which targets are counted.
        parts: the parts of the loss of the micro-batch that was trained last, where it has several.
        looks_again: whether the first forward pass of the step is watched, though the rule of the
            loss is settled.
    """

    weights: WindowWeights | None = None
    index: int = 0
    last: bool = True
    num_samples: int | None = None
    inputs: Any = None
    parts: torch.Tensor | None = None
    looks_again: bool = False
