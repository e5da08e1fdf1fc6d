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
        num_targets: targets that its mean loss is taken over; 0 for a stand-in.
        num_samples: samples; 0 for a stand-in.
        is_last: whether it is the last of all ranks.
    """

    inputs: Any
    num_targets: int
    num_samples: int
    is_last: bool = False


@dataclass(frozen=True)
class Prediction:
    """What one forward pass gave, on any device and nested in any way.

    Attributes:
        loss: mean loss over the targets of the batch, or None.
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
        loss: mean loss per target; None when a batch had no loss.
        num_targets: targets over all ranks.
        num_samples: samples over all ranks.
        num_steps: forward passes of this rank.
    """

    loss: float | None
    num_targets: int
    num_samples: int
    num_steps: int


class Keeper(Protocol):
    """What becomes of predictions."""

    def add(self, batch: EvalBatch, prediction: Prediction | None) -> None:
        """Take what came of a batch; a collective of all ranks now and then.

        Nothing comes of those after ``fail``.
        """
        ...

    def fail(self, error: Exception) -> None:
        """Raise this rank's error on all ranks when they next meet in ``add``, or after the end."""
        ...

    def abort(self, error: Exception) -> None:
        """Nothing came of a batch on this rank: raise the error on all that will take part."""
        ...


@torch.no_grad()
def evaluate_batches(
    batches: Iterable[EvalBatch],
    predict: Callable[[Any], Prediction],
    *,
    device: Any,
    finish: Callable[[Prediction], Prediction] = lambda prediction: prediction,
    keep: Keeper | None = None,
    collective: bool = False,
    on_step: Callable[[], None] = lambda: None,
    meet: Callable[[], None] = lambda: None,
) -> LossTotals:
    """Mean loss over all targets of all ranks; predictions go to ``keep``.

    The mean of batch means would depend on how samples fall into batches; the sum of (batch mean x
    its targets) over the sum of targets does not. Ranks must pass the same number of batches, as
    ZeRO-3 gathers parameters together; those without a sample pass stand-ins with weight 0.

    An error on one rank is raised on all when predictions are next sent; until then this rank goes
    on without keeping anything, in its forward passes too if these are collective. Where nothing is
    sent before the end, which may be an hour away, it is raised at once, on its rank alone.

    Args:
        batches: this rank's batches.
        predict: the forward pass.
        device: where to add up.
        finish: what is done to a prediction before it is kept, by this rank alone.
        keep: takes each batch, stand-ins included, and what came of it.
        collective: ranks meet inside of ``predict``. An error there is raised at once, on its rank
            alone: the others may wait for it in theirs, where nothing can be told to them.
        on_step: called after each batch.
        meet: called after that on every rank, whatever has failed; ranks may meet in it.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = num_samples = num_steps = without_loss = 0
    failure: Exception | None = None
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
            prediction = None
        elif prediction.loss is None:
            without_loss += bool(batch.num_samples)
        elif batch.num_targets:  # the mean over no target is no number, whatever its weight
            loss = torch.as_tensor(prediction.loss, dtype=torch.float64, device=device)
            loss_sum += loss.detach().mean() * batch.num_targets
        num_targets += batch.num_targets
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
    failed = failure is not None  # after what was sent last
    counts = torch.tensor(
        [num_targets, num_samples, without_loss, failed], dtype=torch.float64, device=device
    )
    totals = sum_over_ranks(torch.cat([loss_sum.reshape(1), counts])).tolist()
    total_loss, targets, samples, missing, num_failed = totals
    if num_failed:
        raise_together(failure)
    mean = total_loss / targets if targets and not missing else None
    return LossTotals(mean, int(targets), int(samples), num_steps)


def _noted(error: Exception, keep: Keeper | None) -> Exception:
    """The error, told at once in the log: until it is raised some batches may go by.

    Raises:
        Exception: the error, where nothing is sent.
    """
    if keep is None:
        raise error
    logger.error("the evaluation will end with %s: %s", type(error).__name__, error)
    keep.fail(error)
    return error
