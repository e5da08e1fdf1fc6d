"""The order of samples: each once per epoch, and the same in the same step, on any topology."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data import EpochOrder, RankBatchSampler, Topology

quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)
sizes = st.integers(1, 70)
micro_batches = st.integers(1, 9)
world_sizes = st.integers(1, 9)
seeds = st.integers(-(2**40), 2**40)


def samplers(
    num_samples: int,
    micro_batch: int,
    world_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    epoch: int = 0,
    start: int = 0,
) -> list[RankBatchSampler]:
    """Return the samplers of all ranks."""
    made = []
    for rank in range(world_size):
        order = EpochOrder(num_samples, seed=seed, shuffle=shuffle)
        sampler = RankBatchSampler(
            order, Topology(micro_batch, world_size, rank), drop_last=drop_last
        )
        sampler.set_epoch(epoch, start=start)
        made.append(sampler)
    return made


def used_in_order(ranks: list[RankBatchSampler]) -> list[list[int]]:
    """Return indices that carry weight, per micro-step over all ranks in rank order."""
    batches = [list(sampler) for sampler in ranks]
    steps = []
    for step, of_ranks in enumerate(zip(*batches, strict=True)):
        steps.append(
            [
                index
                for sampler, batch in zip(ranks, of_ranks, strict=True)
                if sampler.share_samples(step)
                for index in batch
            ]
        )
    return steps


# --- EpochOrder ----------------------------------------------------------------------------------


@quick
@given(size=sizes, seed=seeds, epoch=st.integers(0, 1000), shuffle=st.booleans())
def test_an_epoch_is_a_permutation(size, seed, epoch, shuffle):
    """Any seed, negative and large ones too."""
    order = EpochOrder(size, seed=seed, shuffle=shuffle).indices(epoch).tolist()
    assert sorted(order) == list(range(size))


def test_without_shuffling_every_epoch_is_in_order():
    order = EpochOrder(10, seed=3, shuffle=False)
    assert order.indices(0).tolist() == order.indices(7).tolist() == list(range(10))


def test_epochs_differ_and_each_can_be_had_again():
    """Catches one permutation for the whole run, and state carried from one epoch to the next."""
    order = EpochOrder(100, seed=0, shuffle=True)
    epochs = [tuple(order.indices(e).tolist()) for e in range(5)]
    assert len(set(epochs)) == 5
    assert tuple(order.indices(2).tolist()) == epochs[2]


def test_seeds_differ_in_every_epoch():
    """Catches seed + epoch, by which seed 1 would repeat what seed 0 saw one epoch later."""
    seen = {
        tuple(EpochOrder(100, seed=seed, shuffle=True).indices(epoch).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(seen) == 25


def test_the_order_neither_reads_nor_moves_the_global_random_state():
    """A model with dropout must not change the data order, nor the other way round."""
    import torch

    torch.manual_seed(1)
    first = EpochOrder(50, seed=0, shuffle=True).indices(0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert EpochOrder(50, seed=0, shuffle=True).indices(0).equal(first)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)


# --- Topology ------------------------------------------------------------------------------------


@quick
@given(micro_batch=micro_batches, world_size=world_sizes, data=st.data())
def test_shares_of_a_chunk_join_to_the_chunk_and_differ_by_one_at_most(
    micro_batch, world_size, data
):
    topologies = [Topology(micro_batch, world_size, rank) for rank in range(world_size)]
    chunk = topologies[0].chunk
    assert chunk == micro_batch * world_size
    num_samples = data.draw(st.integers(1, chunk))
    shares = [topology.share(num_samples) for topology in topologies]
    assert list(chain(*shares)) == list(range(num_samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, shares)) <= micro_batch


# --- RankBatchSampler ----------------------------------------------------------------------------


@quick
@given(size=sizes, micro_batch=micro_batches, world_size=world_sizes, seed=seeds)
def test_every_sample_once_per_epoch_at_any_topology(size, micro_batch, world_size, seed):
    """Also where the dataset is smaller than one global batch."""
    ranks = samplers(size, micro_batch, world_size, seed=seed)
    assert sorted(chain(*used_in_order(ranks))) == list(range(size))


@quick
@given(size=sizes, micro_batch=micro_batches, world_size=world_sizes, drop_last=st.booleans())
def test_all_ranks_take_equally_many_steps_and_each_has_something_to_run(
    size, micro_batch, world_size, drop_last
):
    """Under ZeRO-3 a rank with a step less leaves the others waiting for ever."""
    ranks = samplers(size, micro_batch, world_size, drop_last=drop_last)
    batches = [list(sampler) for sampler in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    assert all(1 <= len(batch) <= micro_batch for b in batches for batch in b)


@quick
@given(size=sizes, micro_batch=micro_batches, world_size=world_sizes)
def test_padding_comes_in_the_last_step_only_and_are_of_this_step(size, micro_batch, world_size):
    """Samples of another step would be read twice from disk, and could be of another length."""
    ranks = samplers(size, micro_batch, world_size)
    steps = used_in_order(ranks)
    for sampler in ranks:
        for step, batch in enumerate(sampler):
            if not sampler.share_samples(step):
                assert step == len(steps) - 1
                assert batch == steps[step][:1]


@quick
@given(size=sizes, micro_batch=micro_batches, world_size=world_sizes, drop_last=st.booleans())
def test_chunk_samples_counts_what_all_ranks_use(size, micro_batch, world_size, drop_last):
    """The position in the epoch, by which a run resumes, adds these up."""
    ranks = samplers(size, micro_batch, world_size, drop_last=drop_last)
    for step, used in enumerate(used_in_order(ranks)):
        assert {sampler.chunk_samples(step) for sampler in ranks} == {len(used)}


@pytest.mark.parametrize("size", [24, 21, 8, 3])
def test_same_global_batch_means_same_samples_in_the_same_optimizer_step(size):
    """Global batch 8 as micro x accumulation x ranks: the curve must not depend on the split."""

    def optimizer_steps(micro_batch: int, accumulation: int, world_size: int) -> list[list[int]]:
        micro_steps = used_in_order(samplers(size, micro_batch, world_size, seed=5))
        return [
            sorted(chain(*micro_steps[i : i + accumulation]))
            for i in range(0, len(micro_steps), accumulation)
        ]

    shapes = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8), (1, 2, 4), (2, 4, 1)]
    expected = optimizer_steps(*shapes[0])
    assert len(expected) == -(-size // 8)
    for shape in shapes[1:]:
        assert optimizer_steps(*shape) == expected, shape


@quick
@given(size=sizes, micro_batch=micro_batches, world_size=world_sizes)
def test_drop_last_keeps_full_chunks_and_drops_less_than_one(size, micro_batch, world_size):
    steps = used_in_order(samplers(size, micro_batch, world_size, drop_last=True))
    whole = used_in_order(samplers(size, micro_batch, world_size))
    chunk = micro_batch * world_size
    assert all(len(step) == chunk for step in steps)
    assert len(steps) == size // chunk
    assert steps == whole[: len(steps)], "what is kept is the start of the same order"


@quick
@given(
    size=sizes, micro_batch=micro_batches, world_size=world_sizes, data=st.data(), epoch=st.just(3)
)
def test_a_start_leaves_out_exactly_what_was_used(size, micro_batch, world_size, data, epoch):
    """Resuming, on another number of ranks too: nothing twice, nothing lost, the same order."""
    start = data.draw(st.integers(0, size))
    whole = list(chain(*used_in_order(samplers(size, 1, 1, epoch=epoch))))
    rest = samplers(size, micro_batch, world_size, epoch=epoch, start=start)
    assert list(chain(*used_in_order(rest))) == whole[start:]
    assert rest[0].remaining == size - start


def test_after_the_end_nothing_is_left():
    (sampler,) = samplers(10, 4, 1, start=10)
    assert list(sampler) == []
    assert len(sampler) == 0


def test_a_sampler_gives_the_same_epoch_again():
    """torch's loader iterates the sampler once per epoch; there must be no hidden cursor."""
    (sampler,) = samplers(10, 4, 1)
    assert list(sampler) == list(sampler)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_set_epoch_without_a_start_begins_at_the_first_sample():
    (sampler,) = samplers(10, 4, 1, start=8)
    sampler.set_epoch(1)
    assert sampler.remaining == 10


def test_unshuffled_chunks_are_contiguous():
    """Evaluation in order: predictions of rank r, step s are samples of one slice."""
    ranks = samplers(12, 2, 3, shuffle=False)
    assert [list(sampler) for sampler in ranks] == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4, 5], [10, 11]],
    ]
    flat = list(chain(*used_in_order(ranks)))
    assert all(b - a == 1 for a, b in pairwise(flat))
