"""The evaluation loop: every sample once, every target of the same weight, no rank waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.core.ranks import sum_over_ranks


@dataclass(frozen=True)
class EvalBatch:
    """One forward pass of this rank.

    Attributes:
        inputs: the batch on the device.
        num_targets: targets that its mean loss is taken over; 0 for a stand-in.
        num_samples: samples; 0 for a stand-in.
    """

    inputs: Any
    num_targets: int
    num_samples: int


@dataclass(frozen=True)
class LossTotals:
    """Sums over the whole evaluation set, equal on all ranks.

    Attributes:
        loss: mean loss per target; None when the model returned no loss.
        num_targets: targets over all ranks.
        num_samples: samples over all ranks.
        num_steps: forward passes of this rank.
    """

    loss: float | None
    num_targets: int
    num_samples: int
    num_steps: int


@torch.no_grad()
def evaluate_loss(
    batches: Iterable[EvalBatch],
    mean_loss: Callable[[Any], torch.Tensor | None],
    *,
    device: Any,
    on_step: Callable[[], None] = lambda: None,
) -> LossTotals:
    """Mean loss over all targets of all ranks.

    The mean of batch means would depend on how samples fall into batches; the sum of (batch mean x
    its targets) over the sum of targets does not. Ranks must pass the same number of batches, as
    ZeRO-3 gathers parameters together; those without a sample pass stand-ins with weight 0.

    Args:
        batches: this rank's batches.
        mean_loss: the model's mean loss over the targets of one batch, or None.
        device: where to add up.
        on_step: called after each batch.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = num_samples = num_steps = 0
    has_loss = True
    for batch in batches:
        loss = mean_loss(batch.inputs)
        if loss is None:
            has_loss = False
        elif batch.num_targets:
            loss_sum += loss.detach().double() * batch.num_targets
        num_targets += batch.num_targets
        num_samples += batch.num_samples
        num_steps += 1
        on_step()
    totals = torch.stack([loss_sum, *_counts(num_targets, num_samples, device)])
    total_loss, targets, samples = sum_over_ranks(totals).tolist()
    mean = total_loss / targets if has_loss and targets else None
    return LossTotals(mean, int(targets), int(samples), num_steps)


def _counts(num_targets: int, num_samples: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.full((), num_targets, dtype=torch.float64, device=device),
        torch.full((), num_samples, dtype=torch.float64, device=device),
    )
