"""Streams that differ between ranks and are not split: noise, rounding, short and shuffled ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from tests.distributed.later_splits import BEGIN, SIZE, Later, check_refused, generate, of_hub
from tests.distributed.split_data import (
    SAMPLES,
    check_epochs,
    rows,
    trainer_of,
    warnings_of,
)


class Cropped(IterableDataset[Any]):
    """Long samples are cropped at random, and the first are short."""

    own: Any = None

    def __init__(self, draw: str, *, label: bool) -> None:
        self.draw, self.label = draw, label
        if draw == "its own":
            self.own = np.random.default_rng()

    def __iter__(self) -> Iterator[Any]:
        for number in range(SIZE):
            start = 0
            if number >= BEGIN:
                start = {
                    "torch": lambda: int(torch.randint(1000, ())),
                    "numpy": lambda: int(np.random.randint(1000)),
                    "python": lambda: random.randrange(1000),
                    "its own": lambda: int(self.own.integers(1000)),
                }[self.draw]()
            sample = {"input_ids": [start, number]}
            yield {**sample, **({"number": number} if self.label else {})}


class Rarely(Later):
    """Reading fails for a sample or two on one rank, which then gives something else."""

    def __init__(self, numbers: list[int], rank: int) -> None:
        super().__init__(numbers)
        self.failed = (11, 30) if rank else ()

    def __iter__(self) -> Iterator[Any]:
        return generate([0 if n in self.failed else n for n in self.numbers])


class Odd:
    """Stand for a value without content that could be compared."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no array of it")


def mixed(rank: int) -> list[Any]:
    """Make samples of whatever there is."""
    from PIL import Image

    plain = [
        None, 1.5, "text", b"bytes", (1, "two", [3.0, None]), Odd(), {1, 2}, np.float32(2),
        {"a": {"b": [{"c": torch.ones(2, dtype=torch.bfloat16)}]}, "path": f"/disk{rank}"},
        {"image": Image.new("RGB", (4, 3), (1, 2, 3)), "odd": Odd(), "number": 4},
        {"sparse": torch.eye(3).to_sparse(), "meta": torch.ones(2, device="meta")},
        {"names": np.array(["a", "b"]), "when": np.array(["2020-01-01"], dtype="datetime64[D]")},
        torch.arange(3), [], {}, [torch.ones(2) * (1 + 1e-7 * rank), 3],
    ]  # fmt: skip
    return plain * 3


def shuffled(rank: int) -> Any:
    from datasets import Dataset as HubDataset

    whole = HubDataset.from_list(rows(list(range(SIZE)))).to_iterable_dataset(num_shards=4)
    return whole.shuffle(seed=3, buffer_size=7)


def interleaved(rank: int) -> Any:
    from datasets import interleave_datasets

    parts = [of_hub(list(range(begin, SIZE, 2))) for begin in (0, 1)]
    return interleave_datasets(parts, probabilities=[0.7, 0.3], seed=1)


class Listed(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Rounded(IterableDataset[Any]):
    """Machines round differently, and keep their files elsewhere."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        wave = torch.linspace(0, 1, 50)
        for i in range(SIZE):
            yield {"path": f"/{self.rank if i > 5 else 0}/{i}", "wave": wave * i + self._error(i)}

    def _error(self, i: int) -> float:
        return 1e-6 * self.rank * (i > BEGIN)


WHOLE: dict[str, Callable[[int], Any]] = {
    "torch": lambda rank: Later(list(range(SIZE))),
    "short": lambda rank: Later([0, 1, 2]),
    "long": lambda rank: Listed(SAMPLES * 4),
    "hub": lambda rank: of_hub(list(range(SIZE))),
    "shuffled": shuffled,
    "interleaved": interleaved,
    "a generator": lambda rank: generate(list(range(SIZE))),
    "mixed": lambda rank: Listed(mixed(rank)),
    "rounded": Rounded,
    "rare": lambda rank: Rarely(list(range(SIZE)), rank),
    **{
        f"{draw}, {label=}": lambda rank, draw=draw, label=label: Cropped(draw, label=label)
        for draw in ("torch", "numpy", "python", "its own")
        for label in (True, False)
    },
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [1, 5])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_whole_stays_whole(
    kind: str, micro_batch: int, num_workers: int, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In training and in evaluation; all of it is used, as if nobody had looked."""
    from dstrain.core.ranks import gather_objects
    from dstrain.core.seeds import seed_rank
    from dstrain.data import (
        LoaderOptions,
        Topology,
        build_loader,
        detect_split,
        num_shares,
        set_epoch,
        synchronized_batches,
        windows,
    )

    def loader_of() -> Any:
        seed_rank(1, step=0, rank=rank)
        found = build_loader(
            WHOLE[kind](rank), Topology(micro_batch, 2, rank), list,
            LoaderOptions(num_workers=num_workers), seed=1, shuffle=False,
        )  # fmt: skip
        detect_split(found, what="the data")
        assert num_shares(found) == 1
        set_epoch(found, 0)
        return found

    number = len(list(WHOLE[kind](rank)))
    used = [m.num_samples for w in windows(loader_of(), 1) for m in w.micro_batches]
    assert sum(map(sum, gather_objects(used))) == number
    evaluated = [m.num_samples for m, _ in synchronized_batches(loader_of(), device="cpu")]
    assert sum(map(sum, gather_objects(evaluated))) == number
    noisy = kind.endswith("label=False")
    told = warnings_of(caplog, "differ between ranks after those that it begins with")
    assert bool(told) == (noisy and rank == 0)


@pytest.mark.ranks(2)
def test_noise_takes_nothing_of_what_is_still_to_be_read(tmp_path: Path, rank: int) -> None:
    """Samples are read again beside the iteration that goes on."""

    class Counting(Cropped):
        begun = 0

        def __iter__(self) -> Iterator[Any]:
            self.begun += 1
            for self.place, sample in enumerate(super().__iter__()):
                yield {**rows([sample["number"]])[0], "crop": sample["input_ids"]}

        def state_dict(self) -> dict[str, int]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, int]) -> bool:
            return False

    stream = Counting("its own", label=True)
    trainer = trainer_of(
        tmp_path, stream, max_steps=SIZE // 2, save_strategy="steps", save_steps=10
    )
    trainer.train()
    check_epochs(trainer, SIZE, 1)
    assert stream.begun == 1
    from dstrain.data import source_state

    assert source_state(trainer.callback_handler.train_dataloader, SIZE) == {
        "kind": Counting.__qualname__, "state": {"place": SIZE - 1},
    }  # fmt: skip


class Augmented(IterableDataset[Any]):
    """Changes some samples, drawn with a seed of the rank's own: the same in each reading."""

    def __init__(self, seed: int, *, share: float, label: bool) -> None:
        self.seed, self.share, self.label = seed, share, label

    def __iter__(self) -> Iterator[Any]:
        own = random.Random(self.seed)
        for number in range(80):
            tokens = [number, number + 1, number + 2]
            if own.random() < self.share:
                tokens[own.randrange(3)] = own.randrange(1000)
            yield {"input_ids": tokens, **({"label": number * 7 % 3 % 2} if self.label else {})}


class SplitLater(Augmented):
    """Augmented likewise, and split by rank after the first samples, with labels of two classes."""

    rank = 0

    def __iter__(self) -> Iterator[Any]:
        for number, sample in enumerate(super().__iter__()):
            if number < BEGIN:
                yield {"input_ids": [number], "label": number % 2}
            elif number % 2 == self.rank:
                yield {**sample, "label": random.Random(number).randrange(2)}


def read_all(stream: Any, rank: int, *, micro_batch: int = 1) -> int:
    """Use up a stream as training does; returns the samples over all ranks."""
    from dstrain.core.ranks import gather_objects
    from dstrain.data import (
        LoaderOptions,
        Topology,
        build_loader,
        detect_split,
        num_shares,
        set_epoch,
        windows,
    )

    loader = build_loader(
        stream, Topology(micro_batch, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
    )
    detect_split(loader, what="the data")
    assert num_shares(loader) == 1
    set_epoch(loader, 0)
    used = [m.num_samples for w in windows(loader, 1) for m in w.micro_batches]
    return sum(map(sum, gather_objects(used)))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("share", "label"), [(0.1, True), (0.2, True), (0.3, True), (0.1, False), (0.2, False)]
)
def test_noise_of_a_seed_for_each_rank_ends_no_run(share: float, label: bool, rank: int) -> None:
    """Labels are the same where tokens differ; or, without any, the samples in between."""
    for seed in range(12):
        stream = Augmented(2 * seed + rank, share=share, label=label)
        assert read_all(stream, rank) == 80


@pytest.mark.ranks(2)
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_split_with_labels_of_two_classes_is_found(micro_batch: int, rank: int) -> None:
    """Half of them are the same on both ranks by chance."""
    for seed in range(4):
        stream = SplitLater(2 * seed + rank, share=0.3, label=True)
        stream.rank = rank
        check_refused(lambda s=stream: read_all(s, rank, micro_batch=micro_batch), "the data")


class Drawn(IterableDataset[Any]):
    """Noise alone; one rank keeps in memory what it drew when it read the stream again."""

    def __init__(self, keeps: bool) -> None:
        self.keeps, self.kept = keeps, []  # type: ignore[var-annotated]
        self.begun = [0]  # of copies, too

    def __iter__(self) -> Iterator[Any]:
        self.begun[0] += 1
        if not self.kept:
            drawn = [{"crop": [random.randrange(1000)]} for _ in range(SIZE)]
            if not self.keeps or self.begun[0] < 2:
                return iter(drawn)
            self.kept += drawn
        return iter(self.kept)


@pytest.mark.ranks(2, timeout=60)
def test_ranks_compare_on_together_or_not_at_all(rank: int) -> None:
    """Take a field for noise on both ranks where one of them read it differently twice."""
    from dstrain.core.seeds import seed_rank

    seed_rank(1, step=0, rank=rank)
    assert read_all(Drawn(keeps=rank == 0), rank) == SIZE


class Lazy:
    """Draws random numbers whenever it is looked at."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray([random.random(), np.random.rand(), float(torch.rand(()))])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_comparing_leaves_no_trace_in_random_numbers(num_workers: int, rank: int) -> None:
    """A run that goes on from inside an epoch does not compare, and must draw the same noise."""
    from dstrain.core.seeds import seed_rank
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split, set_epoch, windows

    def drawn(watched: bool) -> list[Any]:
        seed_rank(1, step=0, rank=rank)
        loader = build_loader(
            Listed([{"number": i, "lazy": Lazy()} for i in range(SIZE)]), Topology(2, 2, rank),
            lambda samples: [np.asarray(s["lazy"]).tolist() for s in samples],
            LoaderOptions(num_workers=num_workers), seed=1, shuffle=False,
        )  # fmt: skip
        detect_split(loader, what="the data")
        assert loader.dataset.watch is not None  # type: ignore[attr-defined]
        if not watched:
            loader.dataset.watch = None  # type: ignore[attr-defined]
        set_epoch(loader, 0)
        return [m.inputs for w in windows(loader, 1) for m in w.micro_batches]

    assert drawn(True) == drawn(False)
