"""Data that the user has split by rank: used as it is or refused, and never split again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from tests.distributed.runs import losses, make_trainer, whole_weights
from tests.distributed.streams import TellsPosition
from tests.models import RaggedTokens, pad_collate

SAMPLES = RaggedTokens(40, seed=5).examples
EVEN, UNEVEN, SHORT = 24, 23, 7  # samples in all; on 2 and 3 ranks equal, unequal, a few


def rows(numbers: list[int]) -> list[dict[str, Any]]:
    """Make samples that hold their numbers."""
    return [{**SAMPLES[i], "number": i} for i in numbers]


def generate(numbers: list[int]) -> Iterator[dict[str, Any]]:
    yield from rows(numbers)


class Part(IterableDataset[Any]):
    """Every n-th sample, as the documentation of torch has it for loader processes."""

    def __init__(self, rank: int, world_size: int, size: int) -> None:
        self.numbers = list(range(rank, size, world_size))

    def __iter__(self) -> Iterator[Any]:
        return generate(self.numbers)


class PartWithLength(Part):
    """The same, which knows how many it has."""

    def __len__(self) -> int:
        return len(self.numbers)


class Noisy(Part):
    """The same, with noise of the process's own beside its tokens."""

    def __iter__(self) -> Iterator[Any]:
        for row in generate(self.numbers):
            yield {"noise": np.random.default_rng().normal(size=3), **row}


def hub_part(rank: int, world_size: int, size: int) -> Any:
    """Split by ``datasets``, one sample after the other."""
    from datasets import IterableDataset as HubDataset
    from datasets.distributed import split_dataset_by_node

    whole = HubDataset.from_generator(generate, gen_kwargs={"numbers": list(range(size))[:]})
    return split_dataset_by_node(whole, rank, world_size, strategy="examples")


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


def collate(samples: list[Any]) -> dict[str, Any]:
    """Collate samples, with their numbers."""
    return {**pad_collate(samples), "numbers": torch.tensor([s["number"] for s in samples])}


def recording() -> Any:
    """Return a trainer that notes the samples that were trained on this rank, epoch by epoch.

    Its predictions are the numbers of the samples.
    """
    from dstrain import Trainer

    class Recording(Trainer):
        trained: Any = None

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            numbers = inputs.pop("numbers").tolist()
            if self._micro_step.num_samples:  # 0: a stand-in
                self.trained[-1].append(numbers)
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            numbers = inputs.pop("numbers")
            loss, _, labels = super().prediction_step(model, inputs, *others, **named)
            return loss, numbers, labels

    return Recording


def trainer_of(folder: Path, data: Any, **settings: Any) -> Any:
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.trained.append([])

    settings = {
        "evaluation": 0, "per_device_train_batch_size": 1, "remove_unused_columns": False,
        "per_device_eval_batch_size": 2, "cls": recording(), **settings,
    }  # fmt: skip
    trainer = make_trainer(folder, data=data, callbacks=[Epochs()], **settings)
    trainer.data_collator = collate
    trainer.trained, trainer.evaluations = [], []
    trainer.compute_metrics = lambda given: trainer.evaluations.append(given.predictions) or {}
    return trainer


def everywhere(mine: list[list[int]]) -> list[int]:
    """Gather the samples of all ranks, in order of their numbers."""
    from dstrain.core.ranks import gather_objects

    return sorted(i for part in gather_objects(mine) for batch in part for i in batch)


def warnings_of(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if what in r.getMessage()]


def check_epochs(trainer: Any, size: int, num_epochs: int) -> None:
    assert len(trainer.trained) == num_epochs
    for epoch in trainer.trained:
        assert everywhere(epoch) == list(range(size))


def check_evaluations(trainer: Any, size: int, number: int) -> None:
    """Check that the main rank has predicted each sample once."""
    assert len(trainer.evaluations) == (number if trainer.ranks.is_main else 0)
    for numbers in trainer.evaluations:
        assert sorted(numbers.tolist()) == list(range(size))


WORLDS = [pytest.param(n, marks=pytest.mark.ranks(n, timeout=200)) for n in (2, 3)]


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


# --- datasets with a length ----------------------------------------------------------------------


def hub_dataset(rank: int, world_size: int, size: int) -> Any:
    from datasets import Dataset as HubDataset

    whole = HubDataset.from_list(rows(list(range(size))))
    return whole.shard(num_shards=world_size, index=rank)


def hub_nodes(rank: int, world_size: int, size: int) -> Any:
    from datasets import Dataset as HubDataset
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(HubDataset.from_list(rows(list(range(size)))), rank, world_size)


DATASETS: dict[str, Callable[[int, int, int], Any]] = {
    "shard": hub_dataset,
    "split_dataset_by_node": hub_nodes,
    "a list": lambda *part: rows(Part(*part).numbers),
}


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_dataset_that_is_split_is_refused(
    world: int, kind: str, size: int, tmp_path: Path, rank: int
) -> None:
    """To train, to evaluate and to predict with; on all ranks, with what to do instead."""
    from dstrain.core.errors import DataError

    part = DATASETS[kind](rank, world, size)
    trainer = trainer_of(tmp_path, part)
    for use in (trainer.train, lambda: trainer.evaluate(part), lambda: trainer.predict(part)):
        with pytest.raises(DataError, match="is not the same on all ranks") as caught:
            use()
        assert "pass the whole dataset on every rank" in str(caught.value)
    if hasattr(part, "to_iterable_dataset"):
        stream = trainer_of(tmp_path, part.to_iterable_dataset(), max_steps=-(-size // world))
        stream.train()  # as the message says
        check_epochs(stream, size, 1)


class SameEnds(Dataset[Any]):
    """Split by rank; the first, the middle and the last row are the same on all ranks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.numbers = list(range(rank, 33 * world_size, world_size))
        for place in (0, 16, 32):
            self.numbers[place] = 0
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Any:
        self.read.append(place)
        random.random()
        return rows([self.numbers[place] % len(SAMPLES)])[0]


@pytest.mark.ranks(2)
def test_a_split_between_equal_rows_is_refused(tmp_path: Path, rank: int) -> None:
    """Three rows that are the same say little."""
    from dstrain.core.errors import DataError

    part = SameEnds(rank, 2)
    trainer = trainer_of(tmp_path, part)
    for use in (trainer.train, lambda: trainer.evaluate(part), lambda: trainer.predict(part)):
        with pytest.raises(DataError, match="is not the same on all ranks") as caught:
            use()
        assert "pass the whole dataset on every rank" in str(caught.value)


@pytest.mark.ranks(2)
def test_rows_that_are_looked_at_are_few_and_leave_no_trace(rank: int) -> None:
    """From the first to the last, once where they are the same; random numbers are put back."""
    from dstrain.core.seeds import random_state, seed_rank
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split

    seed_rank(1, step=0, rank=rank)
    data = SameEnds(0, 1)
    loader = build_loader(data, Topology(2, 2, rank), list, LoaderOptions(), seed=1, shuffle=False)
    before = random_state()
    detect_split(loader, what="the data")
    assert len(data.read) == 16
    assert (data.read[0], data.read[-1]) == (0, 32)
    assert {b - a for a, b in pairwise(data.read)} == {2, 3}
    assert random_state()["python"] == before["python"]


class Augmented(Dataset[Any]):
    """The same samples on all ranks, with noise that is another on each; or of nothing else."""

    def __init__(self, draw: str, *, label: bool) -> None:
        self.draw, self.label = draw, label
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return EVEN

    def __getitem__(self, index: int) -> Any:
        noise: Any = {
            "torch": lambda: torch.randn(3),
            "numpy": lambda: np.random.rand(3),
            "python": lambda: [random.random() for _ in range(3)],
            "its own": lambda: self.own.normal(size=3),
            "crops of tokens": lambda: SAMPLES[index]["input_ids"][: self.own.integers(2, 4)],
        }[self.draw]()
        return {"noise": noise, **(rows([index])[0] if self.label else {})}


class AugmentedStream(IterableDataset[Any]):
    def __init__(self, dataset: Augmented) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[i] for i in range(len(self.dataset)))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("draw", ["torch", "numpy", "python", "its own", "crops of tokens"])
def test_noise_is_no_split(draw: str, label: bool, rank: int) -> None:
    """Samples that differ between ranks, and from one reading to the next, may be the same data."""
    from dstrain.core.seeds import random_state, seed_rank
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split, num_shares

    seed_rank(1, step=0, rank=rank)
    dataset = Augmented(draw, label=label)
    for data in (dataset, AugmentedStream(dataset)):
        loader = build_loader(
            data, Topology(2, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
        )
        before = random_state()
        detect_split(loader, what="the data")
        after = random_state()
        assert num_shares(loader) == 1
        assert torch.equal(before["torch"], after["torch"])
        assert before["python"] == after["python"]
        assert sum(len(batch) for batch in loader) == EVEN // 2


@pytest.mark.ranks(2)
def test_what_differs_between_machines_is_no_split(rank: int) -> None:
    """Places of files, and the last bits of floating-point numbers."""
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split, num_shares

    wave = torch.linspace(0, 1, 50)
    data = [{"path": f"/disk{rank}/{i}", "wave": wave * i * (1 + 1e-7 * rank)} for i in range(9)]
    for source in (data, AugmentedStream(data)):  # type: ignore[arg-type]
        loader = build_loader(
            source, Topology(2, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
        )
        detect_split(loader, what="the data")
        assert num_shares(loader) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_whole_stream_is_read_once(num_workers: int, tmp_path: Path, rank: int) -> None:
    """Comparing its first samples costs none of them; every sample is trained once."""
    stream = Part(0, 1, UNEVEN)
    trainer = trainer_of(
        tmp_path, stream, max_steps=2 * -(-UNEVEN // 2), dataloader_num_workers=num_workers,
        evaluation=Part(0, 1, UNEVEN), eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    check_epochs(trainer, UNEVEN, 2)
    check_evaluations(trainer, UNEVEN, 2)


@pytest.mark.ranks(2)
def test_a_generator_loses_no_sample(tmp_path: Path) -> None:
    """It can be read but once, and is looked at first all the same."""
    trainer = trainer_of(tmp_path, generate(list(range(SHORT))), max_steps=4)
    trainer.train()
    check_epochs(trainer, SHORT, 1)


# --- ends ----------------------------------------------------------------------------------------


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


# --- lengths -------------------------------------------------------------------------------------


class Told(IterableDataset[Any]):
    """A stream that says a length, rightly or not."""

    def __init__(self, size: int, told: int) -> None:
        self.size, self.told = size, told

    def __len__(self) -> int:
        return self.told

    def __iter__(self) -> Iterator[Any]:
        return generate(list(range(self.size)))


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
    trainer = trainer_of(tmp_path, Told(size, told), num_train_epochs=2, logging_steps=1)
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


# --- resuming ------------------------------------------------------------------------------------


class Telling(TellsPosition, Part):
    """A part that knows where it is."""

    def num_samples(self) -> int:
        return len(self.numbers)

    def sample(self, number: int) -> Any:
        return rows([self.numbers[number - 1]])[0]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("at", [3, 12, 15, 23])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [Telling, Part, hub_part])
def test_a_part_goes_on_where_its_rank_was(
    kind: Any, num_workers: int, at: int, tmp_path: Path, rank: int
) -> None:
    """Bit for bit at the same ranks, also where one of them has none left."""
    size = 21 if at in (3, 15) else UNEVEN  # at 11 of 11 and 10, or 12 of 12 and 11 steps
    settings: dict[str, Any] = {
        "max_steps": 24, "save_strategy": "steps", "save_steps": at,
        "dataloader_num_workers": num_workers,
    }  # fmt: skip
    whole = trainer_of(tmp_path, kind(rank, 2, size), **settings)
    whole.train()
    settings["save_strategy"] = "no"
    Telling.reads = 0
    again = trainer_of(tmp_path / "again", kind(rank, 2, size), **settings)
    again.train(str(tmp_path / f"checkpoint-{at}"))
    ours, theirs = whole_weights(again), whole_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(again) == losses(whole)
    if kind is Telling and not num_workers and at == 3:
        # 8 or 7 of this epoch, 11 or 10 of the next, 2 and one fetched ahead; and to compare.
        assert Telling.reads == (20 if rank else 22) + (2 + 8 + 8)


@pytest.mark.ranks(2)
def test_a_part_does_not_go_on_as_a_whole(tmp_path: Path, rank: int) -> None:
    """Inside of an epoch; between two it does."""
    from dstrain.core.errors import DataError

    settings: dict[str, Any] = {"max_steps": 14, "save_strategy": "steps", "save_steps": 6}
    trainer_of(tmp_path, hub_part(rank, 2, EVEN), **settings).train()
    settings["save_strategy"] = "no"
    whole = trainer_of(tmp_path, Told(EVEN, EVEN), **settings)
    with pytest.raises(DataError, match="came 2 parts, one for each rank in the checkpoint"):
        whole.train(str(tmp_path / "checkpoint-6"))
    whole.train(str(tmp_path / "checkpoint-12"))
    anew = trainer_of(tmp_path, Told(EVEN, EVEN), ignore_data_skip=True, **settings)
    anew.train(str(tmp_path / "checkpoint-6"))
    assert everywhere(anew.trained[0])[:4] == [0, 1, 2, 3]


def test_another_number_of_ranks_is_told(tmp_path: Path) -> None:
    """What is left of a part says nothing of what is left of another; the next epoch goes on."""
    from tests.distributed.forked import run_job

    found = run_job("split", tmp_path, timeout=120)
    assert "the data came 2 parts, one for each rank in the checkpoint" in found["inside"]
    assert "comes 3 parts, one for each rank in this run" in found["inside"]
    assert found["between"] == ""
