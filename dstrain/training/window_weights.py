"""Weighting the micro-batches of an optimizer step in the loss of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dstrain.core.ranks import HostSum, PendingSum, Ranks
from dstrain.data import LossTargets, MicroBatch


def most_telling_first(
    micro_batches: Sequence[MicroBatch], targets: LossTargets
) -> Sequence[MicroBatch]:
    """Put first the micro-batch that shows most about what a target is, while that is not known.

    Only the first forward pass of a step is watched, before its micro-batches are weighted. Which
    one comes first changes nothing else, as their gradients are added up, but which random numbers
    (of dropout) each one meets.
    """
    if len(micro_batches) < 2 or not targets.is_open:
        return micro_batches
    told = [
        0 if m.is_padding else targets.num_distinguished(m.inputs, m.num_samples)
        for m in micro_batches
    ]
    best = told.index(max(told))
    return (micro_batches[best], *micro_batches[:best], *micro_batches[best + 1 :])


class WindowWeights:
    """Weighs the micro-batches of one rank by their targets among those of the global batch.

    Targets are counted before the first forward pass, and added up over ranks while it runs. They
    are counted after it, again, where it shows what a target is: at the begin of a run, and later
    where the batch of a rank tells the rule from others that have counted the same until then.
    """

    def __init__(
        self,
        targets: LossTargets,
        micro_batches: Sequence[MicroBatch],
        ranks: Ranks,
        *,
        device: object,
        host_sum: HostSum | None = None,
        looks_again: bool = False,
    ) -> None:
        """Begin to count, if the rule is settled; a collective of all ranks.

        Args:
            targets: what the loss is a mean over.
            micro_batches: this rank's micro-batches.
            ranks: rank and world size of this process.
            device: the device on which targets are added up.
            host_sum: adds up on the hosts, so that no device is waited for.
            looks_again: whether this step's first forward pass is watched on all ranks.
        """
        self._targets = targets
        self._micro_batches = micro_batches
        self._ranks = ranks
        self._device = device
        self._counts: list[tuple[int, ...]] | None = None
        self._pending: PendingSum | None = None
        self._must_agree = looks_again
        self._question: Callable[[], int] | None = None
        if not targets.settled:
            return
        self._count()
        if targets.has_rivals and host_sum is not None:
            first = micro_batches[0]  # see ``most_telling_first``
            told = not first.is_padding and targets.distinguishes_rivals(
                first.inputs, first.num_samples
            )
            self._question = host_sum.begin(told)

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """Targets of each micro-batch, for each part of its loss; a collective the first time."""
        asked, self._question = self._question, None
        is_distinguished = asked is not None and asked() > 0
        if self._counts is None or is_distinguished or self._must_agree:
            self._must_agree = False
            self._targets.agree(self._ranks, final=True, is_distinguished=is_distinguished)
            if self._pending is not None:
                self._pending.get()
            self._count()
        assert self._counts is not None
        return self._counts

    def expected(self, index: int) -> tuple[int, ...]:
        """Return the targets of a micro-batch by what is known before its forward pass."""
        if self._counts is not None:
            return self._counts[index]
        micro_batch = self._micro_batches[index]
        if micro_batch.is_padding:
            return (0,)
        return self._targets.counts(micro_batch.inputs, micro_batch.num_samples)

    @property
    def totals(self) -> torch.Tensor | float:
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
        assert isinstance(least, torch.Tensor)  # of several parts
        return torch.tensor(counts, device=least.device) * (self._ranks.world_size / least)

    def _count(self) -> None:
        counted = [
            (0,) * len(self._targets.rule.parts)
            if micro_batch.is_padding
            else self._targets.counts(micro_batch.inputs, micro_batch.num_samples)
            for micro_batch in self._micro_batches
        ]
        sums = [sum(parts) for parts in zip(*counted, strict=True)]
        self._counts = counted
        self._pending = PendingSum(sums if len(sums) > 1 else sums[0], device=self._device)
