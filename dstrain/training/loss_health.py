"""Judging losses: those without a target, those that are no number, epochs without a sample."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dstrain.core.errors import DataError, Problem, TrainingError
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.data import LossTargets, no_targets
from dstrain.training.window_weights import WindowWeights

logger = get_logger(__name__)

_MOST_EMPTY = 3
"""Global batches without a target with which a run may begin."""


class LossHealth:
    """Stops a run that cannot learn anything any more, or warns of it."""

    def __init__(self, ranks: Ranks, *, nan_loss: str, max_steps: int) -> None:
        """Begin with a new run.

        Args:
            ranks: rank and world size of this process.
            nan_loss: "stop" or "continue".
            max_steps: optimizer steps of the run.
        """
        self._ranks, self._nan_loss, self._max_steps = ranks, nan_loss, max_steps
        self._has_seen_targets = False
        self._steps_without_targets = 0

    @property
    def stops_on_nan(self) -> bool:
        """Tell whether a loss that is no number ends the run."""
        return self._nan_loss == "stop"

    def look_for_targets(
        self, weights: WindowWeights, inputs: object, targets: LossTargets, *, step: int
    ) -> None:
        """Stop a run whose first global batches have no target: nothing would be learned.

        Waits for the device, in each step until there is a target: in a sound run the first alone.

        Args:
            weights: weights of the micro-batches; they know the targets of the global batch.
            inputs: the first micro-batch of this rank.
            targets: what the loss is a mean over.
            step: the one about to be taken, counted from 1.

        Raises:
            DataError: on all ranks alike.
        """
        if self._has_seen_targets:
            return
        totals = weights.totals
        found = bool(totals.sum()) if isinstance(totals, torch.Tensor) else bool(totals)
        self._has_seen_targets = found
        self._steps_without_targets += 1
        is_last = self._steps_without_targets >= _MOST_EMPTY or step >= self._max_steps
        if not found and is_last:
            raise no_targets(inputs, targets, num_steps=self._steps_without_targets)

    def report_bad_number(self, what: str, why: str, empty_columns: Iterable[str]) -> None:
        """Stop the run, or go on with a warning where ``nan_loss`` says so; on all ranks alike.

        Args:
            what: says what is no number, and when.
            why: says why it matters.
            empty_columns: label columns, of all ranks, that held no target at that point.

        Raises:
            TrainingError: ``nan_loss`` is "stop".
        """
        if not self.stops_on_nan:
            if self._ranks.is_main:
                logger.warning("%s; going on, as nan_loss='continue' says", what)
            return
        names = tuple(sorted(empty_columns))
        if names:
            raise TrainingError(_mean_over_nothing(what, names))
        raise TrainingError(
            Problem(
                what,
                why,
                "lower learning_rate, add warm-up, check the data around that step, use bf16 "
                "instead of fp16; nan_loss='continue' would go on",
            )
        )


def no_sample(epoch: int) -> DataError:
    """Return the error for an epoch without a sample."""
    if not epoch:
        return DataError(
            Problem(
                "the training data ended without a single sample",
                "the data set or loader gives nothing",
                "look at what it was made of: a filter that lets nothing through, an empty folder",
            )
        )
    return DataError(
        Problem(
            f"the training data gave no sample in epoch {epoch + 1}, though it did before",
            "an iterator can be read only once, and a new epoch reads the data again",
            "pass an IterableDataset whose __iter__ begins anew each time, or train for one epoch "
            "(num_train_epochs=1, or max_steps within it)",
        )
    )


def _mean_over_nothing(what: str, empty_columns: tuple[str, ...]) -> Problem:
    """Describe a loss that is no number because label columns had no target."""
    names = ", ".join(empty_columns)
    return Problem(
        f"{what}; {names} held no target in one of its micro-batches",
        "all labels there are ignored (-100, or NaN), and a mean over them is 0/0",
        "let the loss leave out such rows: sum over the targets of each column and divide by "
        "max(1, their number); or give every micro-batch a target of each. If the loss does that, "
        "lower learning_rate or check the data around that step. nan_loss='continue' would go on",
    )
