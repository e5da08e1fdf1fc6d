"""The evaluation loop: every sample once, every target of the same weight, no rank waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dstrain.core.log import get_logger
from dstrain.core.ranks import sum_over_ranks
from dstrain.evaluation.transport import raise_together

logger = get_logger(__name__)


@dataclass(frozen=True)
class EvalBatch:
    """One forward pass of this rank.

    Attributes:
        inputs: the batch.
        num_samples: samples; 0 for a padding batch.
        is_last: whether it is the last of all ranks.
    """

    inputs: Any
    num_samples: int
    is_last: bool = False


@dataclass(frozen=True)
class Prediction:
    """The results of one forward pass, on any device and nested in any way.

    Attributes:
        loss: mean loss over the targets of the batch, of one element or of one for each part of
            the loss; or None.
        predictions: the model's outputs.
        labels: the batch's labels.
        inputs: the batch's main input, where metrics want it.
    """

    loss: torch.Tensor | float | None
    predictions: Any = None
    labels: Any = None
    inputs: Any = None


@dataclass(frozen=True)
class LossTotals:
    """Sums over the whole evaluation set, equal on all ranks.

    Attributes:
        loss: mean loss per target; None when a batch had no loss, or no batch had a target.
        num_targets: targets over all ranks, of all parts of the loss.
        has_loss: whether every batch had a loss.
        num_samples: samples over all ranks.
        num_steps: forward passes of this rank.
    """

    loss: float | None
    num_targets: int
    num_samples: int
    num_steps: int
    has_loss: bool


class PredictionReceiver(Protocol):
    """The receiver of predictions."""

    def add(self, batch: EvalBatch, prediction: Prediction | None) -> None:
        """Keep a batch's results; some of the calls are collectives of all ranks.

        Nothing comes of those after ``fail``.
        """
        ...

    def fail(self, error: Exception) -> None:
        """Raise this rank's error on all ranks when they next meet in ``add``, or after the end."""
        ...

    def abort(self, error: Exception) -> None:
        """Raise the error of a batch without results on all ranks that will take part."""
        ...


@torch.no_grad()
def evaluate_batches(
    batches: Iterable[EvalBatch],
    predict: Callable[[Any], Prediction],
    count: Callable[[EvalBatch], tuple[int, ...]],
    *,
    device: Any,
    is_sum: Callable[[], bool] = lambda: False,
    can_count: Callable[[], bool] = lambda: True,
    finish: Callable[[Prediction], Prediction] = lambda prediction: prediction,
    keep: PredictionReceiver | None = None,
    collective: bool = False,
    on_step: Callable[[], None] = lambda: None,
    meet: Callable[[], None] = lambda: None,
    meet_last: Callable[[], None] = lambda: None,
) -> LossTotals:
    """Return the mean loss over all targets of all ranks; give predictions to ``keep``.

    The mean of batch means would depend on how samples fall into batches; the sum of (batch mean x
    its targets) over the sum of targets does not. Ranks must pass the same number of batches, as
    ZeRO-3 gathers parameters together; those without a sample pass padding batches with weight 0.

    An error on one rank is raised on all when predictions are next sent; until then this rank goes
    on without keeping anything, in its forward passes too if these are collective. Where nothing is
    sent before the end, which may be an hour away, it is raised at once, on its rank alone.

    Args:
        batches: this rank's batches.
        predict: the forward pass.
        count: targets of a batch, for each part of its loss. Asked after ``meet``: what a target
            is may come of the first forward pass.
        device: where to add up.
        is_sum: whether losses are no means but sums, asked at the end.
        can_count: whether ``count`` is final; until then the batches are held, and counted at the
            end at the latest.
        finish: what is done to a prediction before it is kept, by this rank alone.
        keep: takes each batch, padding batches included, and its results.
        collective: ranks meet inside of ``predict``. An error there is raised at once, on its rank
            alone: the others may wait for it in theirs, where nothing can be told to them.
        on_step: called after each batch.
        meet: called after that on every rank, whatever has failed; ranks may meet in it.
        meet_last: likewise, once after the last batch and before what is held is counted.
    """
    sums = _PartSums(device)
    num_samples = num_steps = without_loss = 0
    failure: Exception | None = None
    uncounted: list[tuple[Any, EvalBatch]] = []
    for batch in batches:
        prediction: Prediction | None = None
        if failure is None or collective:
            try:
                prediction = predict(batch.inputs)
            except Exception as error:
                if keep is not None and not collective:
                    keep.abort(error)
                raise
        if failure is None and prediction is not None:
            try:
                prediction = finish(prediction)
            except Exception as error:
                failure = _noted(error, keep)
        if failure is not None or prediction is None:
            prediction = loss = None
        else:
            loss = prediction.loss
            without_loss += bool(batch.num_samples) and loss is None
        num_samples += batch.num_samples
        num_steps += 1
        if keep is not None:
            keep.add(batch, prediction)
        del prediction  # or its tensors would live through the next forward pass
        if failure is None:
            try:
                on_step()
            except Exception as error:
                failure = _noted(error, keep)
        meet()
        if batch.num_samples and loss is not None:
            uncounted.append((loss, batch))
        if can_count():
            sums.add_all(uncounted, count)
    meet_last()
    sums.add_all(uncounted, count)
    failed = failure is not None  # after what was sent last
    counts = torch.tensor([num_samples, without_loss, failed], dtype=torch.float64, device=device)
    samples, missing, num_failed, *parts = sum_over_ranks(torch.cat([counts, sums.all()])).tolist()
    if num_failed:
        raise_together(failure)
    losses, targets = parts[:_MOST_PARTS], parts[_MOST_PARTS:]
    mean: float | None = None
    if any(targets) and not missing:
        pairs = zip(losses, targets, strict=True)
        mean = sum(loss / (1 if is_sum() else number) for loss, number in pairs if number)
    return LossTotals(mean, int(sum(targets)), int(samples), num_steps, not missing)


_MOST_PARTS = 2
"""Parts that a loss has at most: as many numbers go over ranks, also from one that saw none."""


class _PartSums:
    """Sums of losses x targets, and of targets, for each part of the loss."""

    def __init__(self, device: Any) -> None:
        self._losses = torch.zeros(_MOST_PARTS, dtype=torch.float64, device=device)
        self._targets = [0] * _MOST_PARTS

    def add_all(
        self,
        losses: list[tuple[Any, EvalBatch]],
        count: Callable[[EvalBatch], tuple[int, ...]],
    ) -> None:
        """Add the losses of batches, and empty the list."""
        for loss, batch in losses:
            self.add(loss, count(batch))
        losses.clear()

    def add(self, loss: Any, counts: tuple[int, ...]) -> None:
        """Add a batch's loss; nothing waits for the device."""
        parts = torch.as_tensor(loss, dtype=torch.float64, device=self._losses.device).detach()
        if len(counts) == 1:
            parts = parts.mean().reshape(1)
        for index, (part, number) in enumerate(zip(parts, counts, strict=True)):
            if number:  # the mean over no target is no number, whatever its weight
                self._losses[index] += part * number
                self._targets[index] += number

    def all(self) -> torch.Tensor:
        """Return the sums of losses, then those of targets: (2 x parts,)."""
        targets = torch.tensor(self._targets, dtype=torch.float64, device=self._losses.device)
        return torch.cat([self._losses, targets])


def _noted(error: Exception, keep: PredictionReceiver | None) -> Exception:
    """Return the error, and log it at once: until it is raised some batches may go by.

    Raises:
        Exception: the error, where nothing is sent.
    """
    if keep is None:
        raise error
    logger.error("the evaluation will end with %s: %s", type(error).__name__, error)
    keep.fail(error)
    return error
