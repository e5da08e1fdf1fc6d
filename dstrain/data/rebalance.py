"""Distribution of an optimizer step's samples to ranks and micro-batches so that costs are equal.

A micro-batch is padded to its longest sample. With equal numbers of samples, ranks with short
samples would wait for those with long ones. Here the samples of a step are sorted by length and cut
into as many groups as there are (rank, micro-batch) pairs: few long samples in one group, many
short samples in another. The set of samples in a step is unchanged, and so is the loss, which
weights by targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.worker_seeds import SeededIndices

# Cost of attention for a token, per token of the padded length, as transformers'
# BatchRebalanceSampler.QUADRATIC_COST_COEF (trainer_pt_utils.py).
_ATTENTION = 0.001


def padded_cost(num_samples: int, length: int) -> float:
    """Return the cost of a micro-batch whose samples are padded to ``length`` tokens, in tokens."""
    return num_samples * length * (1 + _ATTENTION * length)


def deal(lengths: Sequence[int], world_size: int, micro_steps: int) -> list[list[list[int]]]:
    """Distribute the samples of an optimizer step to ranks and micro-steps.

    Minimises the largest cost of a group over all cuts of the sorted samples, by a bisection over
    costs; each cost is tried by filling groups from the longest sample on. Time grows with
    samples x log(samples), and not with the number of ranks.

    Args:
        lengths: lengths of the step's samples.
        world_size: number of ranks.
        micro_steps: micro-batches of each rank.

    Returns:
        For each micro-step and rank, indices into ``lengths``. The first micro-step has the
        costliest groups and so on, so that groups computed at the same time cost about the same. A
        group is empty only where there are fewer samples than groups.
    """
    num_groups = world_size * micro_steps
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    sorted_lengths = [lengths[place] for place in order]
    cuts = _cheapest_cuts(sorted_lengths, num_groups)
    groups = [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    costs = [padded_cost(b - a, sorted_lengths[a]) for a, b in zip(cuts, cuts[1:], strict=False)]
    by_cost = sorted(range(len(groups)), key=lambda group: (-costs[group], group))
    dealt = [groups[group] for group in by_cost] + [[]] * (num_groups - len(groups))
    return [dealt[step * world_size : (step + 1) * world_size] for step in range(micro_steps)]


def _cheapest_cuts(lengths: list[int], num_groups: int) -> list[int]:
    """Return the cuts of samples, sorted from long to short, with the smallest largest cost.

    No group is empty.
    """
    num_groups = min(num_groups, len(lengths))
    low, high = 0.0, padded_cost(len(lengths), lengths[0])
    best = _fill(lengths, num_groups, high)
    assert best is not None, "one group of all samples costs no more"
    # Costs that differ by less than a millionth count as equal: rounding errors are as large.
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        cuts = _fill(lengths, num_groups, middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
    return best


def _fill(lengths: list[int], num_groups: int, most: float) -> list[int] | None:
    """Return cuts into ``num_groups`` groups of cost at most ``most``; None if there are none."""
    cuts = [0]
    for group in range(num_groups):
        start = cuts[-1]
        length = lengths[start]
        # The factor keeps a rounding error from lowering an exact quotient.
        fits = int(most / padded_cost(1, length) * (1 + 1e-9)) if length else len(lengths)
        if fits < 1:
            return None
        # Each of the groups to come needs a sample.
        room = len(lengths) - start - (num_groups - group - 1)
        cuts.append(start + min(fits, room))
    return cuts if cuts[-1] == len(lengths) else None


class RebalancedBatchSampler(RankBatchSampler):
    """Batch sampler whose micro-batches have similar costs instead of equal numbers of samples.

    Optimizer steps have the same samples as with ``RankBatchSampler``, ``chunk x accumulation``
    each; only their distribution to ranks and micro-batches changes.
    """

    def __init__(
        self,
        order: EpochOrder,
        topology: Topology,
        *,
        lengths: torch.Tensor,
        accumulation: int,
        drop_last: bool = False,
    ) -> None:
        """Set the position to the start of epoch 0.

        Args:
            order: global order of samples.
            topology: this rank among all ranks.
            lengths: lengths of all samples of the dataset.
            accumulation: micro-batches per optimizer step.
            drop_last: whether to drop a last chunk that does not fill all ranks.
        """
        super().__init__(order, topology, drop_last=drop_last)
        self._lengths = lengths
        self._accumulation = accumulation
        self._left: tuple[tuple[int, int], torch.Tensor] | None = None
        self._read: tuple[tuple[int, int, int], list[list[list[int]]]] | None = None

    def whole(self) -> RebalancedBatchSampler:
        """Return a copy of the sampler at the beginning of an epoch."""
        return RebalancedBatchSampler(
            self.order,
            self.topology,
            lengths=self._lengths,
            accumulation=self._accumulation,
            drop_last=self.drop_last,
        )

    def chunk_samples(self, step: int) -> int:
        """Return the samples over all ranks in micro-step ``step``, counted from ``start``."""
        return sum(len(group) for group in self._dealt_at(step))

    def share_samples(self, step: int) -> int:
        """Return the samples of this rank in micro-step ``step``; 0 for a padding batch."""
        return len(self._dealt_at(step)[self.topology.rank])

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of indices, one per micro-step, each with the seed of its random numbers."""
        indices = self._indices()
        for window in range(-(-len(self) // self._accumulation)):
            samples = self._window_samples(indices, window)
            for number, groups in enumerate(self._deal(samples)):
                mine = groups[self.topology.rank] or groups[0][:1] or [0]
                first = (window * self._accumulation + number) * self.topology.chunk
                yield SeededIndices(samples[mine].tolist(), self._seed_at(first))

    def _indices(self) -> torch.Tensor:
        """Return the indices of the epoch's remaining samples; cached, as an order is expensive."""
        key = (self.epoch, self.start)
        if self._left is None or self._left[0] != key:
            self._left = key, self.order.indices(self.epoch)[self.start :][: self.remaining]
        return self._left[1]

    def _window_samples(self, indices: torch.Tensor, window: int) -> torch.Tensor:
        size = self.topology.chunk * self._accumulation
        return indices[window * size : (window + 1) * size]

    def _deal(self, samples: torch.Tensor) -> list[list[list[int]]]:
        micro_steps = -(-len(samples) // self.topology.chunk)
        return deal(self._lengths[samples].tolist(), self.topology.world_size, micro_steps)

    def _dealt_at(self, step: int) -> list[list[int]]:
        """Return a micro-step's groups, one per rank; cache those of the latest optimizer step."""
        window, number = divmod(step, self._accumulation)
        key = (self.epoch, self.start, window)
        if self._read is None or self._read[0] != key:
            self._read = (key, self._deal(self._window_samples(self._indices(), window)))
        return self._read[1][number]
