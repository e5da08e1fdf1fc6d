"""What each micro-batch of an optimizer step weighs in the loss of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dstrain.core.ranks import PendingSum, Ranks
from dstrain.data import LossTargets, MicroBatch


class WindowWeights:
    """Weighs the micro-batches of one rank by their targets among those of the global batch.

    Targets are counted before the first forward pass, and added up over ranks while it runs. Only
    at the begin of a run are they counted after it: what a target is, is read off it.
    """

    def __init__(
        self,
        targets: LossTargets,
        micro_batches: Sequence[MicroBatch],
        ranks: Ranks,
        *,
        device: Any,
    ) -> None:
        """Begin to count, if the rule is settled; a collective of all ranks."""
        self._targets = targets
        self._micro_batches = micro_batches
        self._ranks = ranks
        self._device = device
        self._counts: list[tuple[int, ...]] | None = None
        self._pending: PendingSum | None = None
        if targets.settled:
            self._count()

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """Return the targets of each micro-batch by part of its loss; at first a collective."""
        if self._counts is None:
            self._targets.settle(self._ranks, final=True)
            self._count()
        assert self._counts is not None
        return self._counts

    @property
    def totals(self) -> Any:
        """Return the targets of the window over all ranks, for each part of the loss.

        Returns:
            a number or a tensor of shape () for a loss of one part, else a tensor of (parts,).
        """
        assert self._pending is not None
        return 1.0 if self._targets.rule.is_sum else self._pending.get()

    def of(self, index: int) -> torch.Tensor | float:
        """Return the factor of a micro-batch's loss in this rank's loss.

        DeepSpeed's mean over ranks is then the mean over all targets of the global batch.

        Returns:
            a number or a tensor of shape () for a loss of one part, else a tensor of (parts,).
        """
        counts = self.counts[index]
        totals = self.totals
        # A window without any target has no gradient.
        least = totals.clamp(min=1.0) if isinstance(totals, torch.Tensor) else max(1.0, totals)
        if len(counts) == 1:
            return counts[0] * self._ranks.world_size / least
        return torch.tensor(counts, device=least.device) * (self._ranks.world_size / least)

    def _count(self) -> None:
        counted = [
            (0,) * len(self._targets.rule.parts)
            if micro_batch.masked
            else self._targets.counts(micro_batch.inputs, micro_batch.num_samples)
            for micro_batch in self._micro_batches
        ]
        sums = [sum(parts) for parts in zip(*counted, strict=True)]
        self._counts = counted
        self._pending = PendingSum(sums if len(sums) > 1 else sums[0], device=self._device)
