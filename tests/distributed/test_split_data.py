"""Streams that the user has split by rank: used as they are, and never split again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from tests.distributed.runs import losses, whole_weights
from tests.distributed.split_data import (
    EVEN,
    SHORT,
    UNEVEN,
    ClaimsLength,
    Part,
    check_epochs,
    check_evaluations,
    everywhere,
    generate,
    hub_part,
    rows,
    trainer_of,
    warnings_of,
)


class PartWithLength(Part):
    """The same, which knows how many it has."""

    def __len__(self) -> int:
        return len(self.numbers)


class Noisy(Part):
    """The same, with noise of the process's own beside its tokens."""

    def __iter__(self) -> Iterator[Any]:
        for row in generate(self.numbers):
            yield {"noise": np.random.default_rng().normal(size=3), **row}


def hub_shards(rank: int, world_size: int, size: int) -> Any:
    """Split by ``datasets`` into whole shards, which the dataset itself does not know of."""
    from datasets import Dataset as HubDataset

    whole = HubDataset.from_list(rows(list(range(size)))).to_iterable_dataset(num_shards=world_size)
    return whole.shard(num_shards=world_size, index=rank)


STREAMS: dict[str, Callable[[int, int, int], Any]] = {
    "split_dataset_by_node": hub_part,
    "shards": hub_shards,
    "torch": Part,
    "with a length": PartWithLength,
    "noisy": Noisy,
    "a generator": lambda *part: generate(Part(*part).numbers),
}


@pytest.mark.parametrize(
    ("world", "size"),
    [
        pytest.param(w, s, marks=pytest.mark.ranks(w, timeout=200))
        for w, s in ((2, EVEN), (2, UNEVEN), (3, UNEVEN), (3, SHORT))
    ],
)
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_is_split_is_used_as_it_is(
    world: int, kind: str, size: int, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each sample once an epoch, in training and in an evaluation at its end; no rank hangs."""
    part = STREAMS[kind](rank, world, size)
    steps = -(-size // world)
    epochs = 1 if kind == "a generator" else 2
    length: dict[str, Any] = {"max_steps": epochs * steps}
    if kind == "with a length":
        length = {"num_train_epochs": epochs}
    evaluation = hub_part if kind == "a generator" else STREAMS[kind]
    trainer = trainer_of(
        tmp_path, part, evaluation=evaluation(rank, world, size), eval_strategy="epoch", **length
    )
    trainer.train()
    assert trainer.state.global_step == epochs * steps
    check_epochs(trainer, size, epochs)
    check_evaluations(trainer, size, epochs)
    found = trainer.evaluate()
    whole = trainer.evaluate(rows(list(range(size))))
    assert found["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    told = warnings_of(caplog, "already split by rank")
    assert any("the training data" in line for line in told) == (rank == 0)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_parts_train_like_the_whole(
    accumulation: int, num_workers: int, tmp_path: Path, rank: int
) -> None:
    """Where parts are every n-th sample the steps are the same, to the last short one."""
    settings = {
        "max_steps": 2 * -(-UNEVEN // (2 * accumulation)), "dataloader_num_workers": num_workers,
        "gradient_accumulation_steps": accumulation, "stage": 3,
    }  # fmt: skip
    split = trainer_of(tmp_path / "split", Part(rank, 2, UNEVEN), **settings)
    split.train()
    whole = trainer_of(tmp_path / "whole", Part(0, 1, UNEVEN), **settings)
    whole.train()
    assert losses(split) == losses(whole)
    ours, theirs = whole_weights(split), whole_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.ranks(2)
def test_drop_last_ends_with_the_first_rank(tmp_path: Path, rank: int) -> None:
    """As it leaves out what does not fill a micro-batch on every rank."""
    part = Part(rank, 2, 11)  # 6 and 5
    trainer = trainer_of(
        tmp_path, part, per_device_train_batch_size=2, dataloader_drop_last=True, max_steps=4
    )
    trainer.train()
    assert [everywhere(epoch) for epoch in trainer.trained] == [list(range(8))] * 2


@pytest.mark.ranks(2)
def test_a_rank_without_a_sample_is_told_on_all(tmp_path: Path, rank: int) -> None:
    """Nothing can stand in for it."""
    from dstrain.core.errors import DataError

    trainer = trainer_of(tmp_path, Part(rank, 2, 1), max_steps=2)
    with pytest.raises(DataError, match="only 1 of 2 ranks have training data"):
        trainer.train()


@pytest.mark.ranks(2)
def test_parts_of_another_world_are_refused(tmp_path: Path, rank: int) -> None:
    """As many parts as ranks, or none."""
    from dstrain.core.errors import ConfigError, DataError

    for place in ((0, 2), (rank, 3)):
        trainer = trainer_of(tmp_path, hub_part(*place, EVEN), max_steps=2)
        with pytest.raises(DataError, match="split by node into other parts") as caught:
            trainer.train()
        assert f"rank {rank} has part {place[0]} of {place[1]}" in str(caught.value)
        with pytest.raises(DataError, match="split by node into other parts"):
            trainer.evaluate(hub_part(*place, EVEN))
    trainer = trainer_of(tmp_path, hub_part(rank, 2, EVEN), max_steps=2, dispatch_batches=True)
    with pytest.raises((DataError, ConfigError), match="would read its part alone"):
        trainer.train()


@pytest.mark.ranks(1)
def test_a_part_on_a_single_rank_is_refused(tmp_path: Path) -> None:
    """The other half would never be read."""
    from dstrain.core.errors import DataError

    trainer = trainer_of(tmp_path, hub_part(0, 2, EVEN), max_steps=2)
    with pytest.raises(DataError, match="split by node into other parts"):
        trainer.train()


class EndsEarly(IterableDataset[Any]):
    """The same samples on all ranks; on one of them the last are missing, or reading fails."""

    def __init__(self, rank: int, size: int, fails: bool) -> None:
        self.rank, self.size, self.fails = rank, size, fails

    def __iter__(self) -> Iterator[Any]:
        yield from rows(list(range(self.size if self.rank else 24)))
        if self.rank and self.fails:
            raise OSError("the disk is gone")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("size", "accumulation"), [(12, 1), (13, 1), (12, 3), (13, 3), (14, 3), (15, 3), (16, 3)]
)
def test_streams_that_end_apart_end_in_one_error(
    size: int, accumulation: int, fails: bool, tmp_path: Path, rank: int
) -> None:
    """Wherever in a window that is; nobody waits for the other."""
    from dstrain.core.errors import DataError

    trainer = trainer_of(
        tmp_path, EndsEarly(rank, size, fails), max_steps=99, eval_strategy="epoch",
        evaluation=rows([0, 1, 2]), gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    expected: Any = DataError
    message = r"ended on 1 of 2 ranks"
    if fails:
        expected, message = (OSError, "is gone") if rank else (DataError, "failed on rank 1")
    with pytest.raises(expected, match=message):
        trainer.train()
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.ranks(2)
def test_a_part_that_fails_is_told_on_all(tmp_path: Path, rank: int) -> None:
    """The other rank has samples of its own left."""
    from dstrain.core.errors import DataError

    class Fails(Part):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            if rank:
                raise OSError("the disk is gone")

    trainer = trainer_of(tmp_path, Fails(rank, 2, UNEVEN), max_steps=99)
    with pytest.raises(OSError if rank else DataError, match="the disk is gone"):
        trainer.train()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("size", "told", "steps", "epochs", "said"),
    [
        (23, 23, 24, 2, ""),
        (12, 24, 12, 2, "and gives fewer"),
        (24, 12, 12, 1, "and gives more"),
        (30, 24, 24, 2, "and gives more"),
    ],
)
def test_the_length_of_a_stream_counts(
    size: int,
    told: int,
    steps: int,
    epochs: int,
    said: str,
    tmp_path: Path,
    rank: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Epochs and schedule follow from it; a wrong one is told, and no step more is made."""
    trainer = trainer_of(tmp_path, ClaimsLength(size, told), num_train_epochs=2, logging_steps=1)
    trainer.train()
    scheduled = 2 * -(-told // 2)
    assert trainer.state.max_steps == scheduled
    assert trainer.state.global_step == steps
    assert len(trainer.trained) == epochs
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    expected = [1e-3 * (scheduled - n) / scheduled for n in range(steps)]
    assert rates == pytest.approx(expected)
    lines = warnings_of(caplog, f"says that it has {told} samples")
    assert len(lines) == bool(said and rank == 0)
    assert all(said in line for line in lines)
    if not said:
        check_epochs(trainer, size, epochs)
        assert trainer.state.epoch == 2.0
