"""Samples dealt by length: each once, the same ones in each optimizer step, at alike cost."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data import EpochOrder, RankBatchSampler, Topology
from dstrain.data.rebalance import RebalancedBatchSampler, deal, padded_cost

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
lengths_of_samples = st.lists(st.integers(0, 200), min_size=1, max_size=60)


def sampler(
    lengths: list[int], topology: Topology, accumulation: int, *, start: int = 0, **more: bool
) -> RebalancedBatchSampler:
    order = EpochOrder(len(lengths), seed=3, shuffle=True)
    made = RebalancedBatchSampler(
        order, topology, lengths=torch.tensor(lengths), accumulation=accumulation, **more
    )
    made.set_epoch(1, start=start)
    return made


@quick
@given(lengths_of_samples, st.integers(1, 4), st.integers(1, 4))
def test_every_sample_is_dealt_once(lengths: list[int], world_size: int, micro_steps: int):
    dealt = deal(lengths, world_size, micro_steps)
    assert [len(ranks) for ranks in dealt] == [world_size] * micro_steps
    groups = [group for ranks in dealt for group in ranks]
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert sum(not group for group in groups) == max(0, len(groups) - len(lengths))


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 4))
def test_no_other_cut_of_the_sorted_samples_is_cheaper(lengths: list[int], world_size: int):
    """Against all of them."""

    def cost(group: list[int]) -> float:
        return padded_cost(len(group), max(group)) if group else 0.0

    ordered = sorted(lengths, reverse=True)
    groups = min(world_size, len(ordered))
    best = min(
        max(cost(ordered[a:b]) for a, b in zip((0, *cuts), (*cuts, len(ordered)), strict=True))
        for cuts in combinations(range(1, len(ordered)), groups - 1)
    )
    (ranks,) = deal(lengths, world_size, 1)
    assert max(cost([lengths[i] for i in group]) for group in ranks) <= best * (1 + 1e-5)


@quick
@given(lengths_of_samples, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_an_optimizer_step_has_the_samples_that_it_has_without(
    lengths: list[int], micro_batch: int, world_size: int, accumulation: int, drop_last: bool
):
    """And each of its micro-steps says how many there are, over all ranks and on this one."""
    there = EpochOrder(len(lengths), seed=3, shuffle=True)
    topologies = [Topology(micro_batch, world_size, rank) for rank in range(world_size)]
    plain = RankBatchSampler(there, topologies[0], drop_last=drop_last)
    ranks = [sampler(lengths, t, accumulation, drop_last=drop_last) for t in topologies]
    assert {len(rank) for rank in ranks} == {len(plain)}
    batches = [list(rank) for rank in ranks]
    assert {len(of_rank) for of_rank in batches} == {len(plain)}
    window = micro_batch * world_size * accumulation
    expected = there.indices(1)[: plain.remaining].tolist()
    for first in range(0, len(plain), accumulation):
        used = []
        for step in range(first, min(first + accumulation, len(plain))):
            shares = [rank.share_samples(step) for rank in ranks]
            assert {rank.chunk_samples(step) for rank in ranks} == {sum(shares)}
            for share, of_rank in zip(shares, batches, strict=True):
                assert len(of_rank[step]) == max(1, share), "a padding batch where it has none"
                used += of_rank[step] if share else []
        at = first // accumulation * window
        assert sorted(used) == sorted(expected[at : at + window])


def test_a_run_goes_on_inside_of_an_epoch_where_it_was():
    lengths = [1 + 7 * i % 40 for i in range(40)]
    topology = Topology(2, world_size=2, rank=1)
    whole, rest = (sampler(lengths, topology, 2, start=start) for start in (0, 16))
    assert list(rest) == list(whole)[4:]
    assert len(rest.whole()) == len(whole)


def test_ranks_wait_less_for_each_other():
    """The same samples; what the slower of two ranks computes in all micro-steps."""
    torch.manual_seed(0)
    lengths = (torch.rand(512).pow(3) * 500 + 1).long().tolist()

    def slowest(kind: type[RankBatchSampler]) -> float:
        steps = []
        for rank in range(2):
            topology = Topology(8, 2, rank)
            if kind is RankBatchSampler:
                made: RankBatchSampler = RankBatchSampler(
                    EpochOrder(len(lengths), seed=3, shuffle=True), topology
                )
                made.set_epoch(1)
            else:
                made = sampler(lengths, topology, 1)
            steps.append([padded_cost(len(b), max(lengths[i] for i in b)) for b in made])
        return sum(max(pair) for pair in zip(*steps, strict=True))

    assert slowest(RebalancedBatchSampler) < 0.75 * slowest(RankBatchSampler)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [5]])
def test_lengths_of_nothing_are_lengths(lengths: list[int]):
    assert sum(len(g) for ranks in deal(lengths, 2, 2) for g in ranks) == len(lengths)
