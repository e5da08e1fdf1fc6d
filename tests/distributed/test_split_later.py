"""Streams that begin alike on all ranks, and are split by rank: found while they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.data.comparison.stream_watch import WATCHED_SAMPLES
from tests.distributed.later_splits import (
    BEGIN,
    SIZE,
    Later,
    Once,
    alike_on_all,
    check_refused,
    generate,
    numbers_of,
    of_hub,
)
from tests.distributed.runs import losses, whole_weights
from tests.distributed.split_data import (
    SAMPLES,
    Part,
    rows,
    trainer_of,
)
from tests.distributed.streams import TellsPosition

KINDS: dict[str, Callable[[list[int]], Any]] = {
    "torch": Later,
    "hub": of_hub,
    "a generator": generate,
    "a single iteration": Once,
}


@pytest.mark.ranks(2, timeout=200)
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_where_ranks_part(
    kind: str, num_workers: int, micro_batch: int, tmp_path: Path, rank: int
) -> None:
    """Soon after the samples that are the same, wherever they are read."""
    trainer = trainer_of(
        tmp_path, KINDS[kind](numbers_of(rank, 2)), max_steps=99,
        per_device_train_batch_size=micro_batch, dataloader_num_workers=num_workers,
        gradient_accumulation_steps=3 if micro_batch == 1 else 1,
    )  # fmt: skip
    text = check_refused(trainer.train, "the training data")
    assert "of rank 1 is not that of rank 0 in " in text
    assert f"from number {BEGIN} on" in text
    # At once where samples can be read again, or after a few that are others.
    again = kind in ("torch", "hub")
    assert sum(map(len, trainer.trained[0])) <= (10 if again else 18)


@pytest.mark.ranks(3, timeout=200)
def test_one_rank_among_three_is_found(tmp_path: Path, rank: int) -> None:
    """Also where it is not the main one that reads something else."""
    trainer = trainer_of(tmp_path, Later(numbers_of(int(rank == 1), 2)), max_steps=99)
    text = check_refused(trainer.train, "the training data")
    assert "of rank 1 is not that of rank 0 in " in text


@pytest.mark.ranks(2)
@pytest.mark.parametrize("micro_batch", [1, 4, 64])
@pytest.mark.parametrize("again", [True, False])
def test_every_second_sample_is_enough(
    again: bool, micro_batch: int, tmp_path: Path, rank: int
) -> None:
    """Documents of each rank's own with the same separator between them."""
    own = [i for n in range(1, SIZE // 2) for i in (0, 2 * n + rank)]
    trainer = trainer_of(
        tmp_path, (Later if again else Once)([0, *own]), max_steps=99,
        per_device_train_batch_size=micro_batch,
    )  # fmt: skip
    check_refused(trainer.train, "the training data")


@pytest.mark.ranks(2, timeout=200)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_and_prediction_end_likewise(
    num_workers: int, tmp_path: Path, rank: int
) -> None:
    """No metrics of one half of the data."""
    trainer = trainer_of(
        tmp_path, Part(0, 1, 8), max_steps=4, eval_strategy="epoch",
        evaluation=Later(numbers_of(rank, 2)), dataloader_num_workers=num_workers,
    )  # fmt: skip
    for use in (
        trainer.train,
        trainer.evaluate,
        lambda: trainer.predict(Later(numbers_of(rank, 2))),
        lambda: trainer.evaluate(of_hub(numbers_of(rank, 2))),
    ):
        check_refused(use, "the evaluation data")
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.ranks(2)
def test_an_evaluation_stream_that_ends_apart_is_refused(tmp_path: Path, rank: int) -> None:
    """Of what only one rank has, nobody would use the other rank's share."""
    from dstrain.core.errors import DataError

    for short in (12, 13):
        trainer = trainer_of(tmp_path, Part(0, 1, 8), max_steps=4)
        with pytest.raises(DataError, match="the stream ended on 1 of 2 ranks") as caught:
            trainer.evaluate(Part(0, 1, short if rank else 24))
        assert alike_on_all(str(caught.value))


class Exchanges:
    """Counts what ranks tell each other, and how many numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch.distributed as dist

        self.sizes: list[int] = []
        self.others = 0
        reduce = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        for name in ("all_gather_object", "broadcast_object_list", "all_gather", "broadcast"):
            monkeypatch.setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.others += 1
            return function(*args, **kwargs)

        return call


@pytest.mark.ranks(2)
@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("watched", [True, False])
def test_nothing_more_is_told_than_a_few_numbers(
    watched: bool, evaluates: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many exchanges as without it, and after 64 samples none is longer; nothing is read."""
    from dstrain.data import (
        LoaderOptions,
        Topology,
        build_loader,
        detect_split,
        set_epoch,
        synchronized_batches,
        windows,
    )
    from dstrain.data.streams import rank_stream as module

    read, looked = [], []
    summary_of = module.summary_of
    monkeypatch.setattr(module, "summary_of", lambda *given: looked.append(1) or summary_of(*given))

    class Long(Later):
        def __iter__(self) -> Iterator[Any]:
            for sample in super().__iter__():
                read.append(1)
                yield sample

    numbers = [i % SIZE for i in range(100)]
    loader = build_loader(
        Long(numbers), Topology(1, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
    )
    detect_split(loader, what="the data")
    assert len(read) == 2  # as many as the first micro-step takes
    if not watched:
        loader.dataset.watch = None  # type: ignore[attr-defined]
    told = Exchanges(monkeypatch)
    for _ in range(2):
        set_epoch(loader, 0)
        steps: Any = synchronized_batches(loader, device="cpu") if evaluates else windows(loader, 1)
        assert len(list(steps)) == 50
    assert len(read) == 200  # what was looked at first is not read again
    assert told.others == 0
    assert len(told.sizes) == 2 * 51
    assert len(looked) == (WATCHED_SAMPLES if watched else 0)
    long = [index for index, size in enumerate(told.sizes) if size > 2]
    assert long == (list(range(WATCHED_SAMPLES // 2)) if watched else [])


class Telling(TellsPosition, Later):
    """A stream that knows where it is."""

    def num_samples(self) -> int:
        return len(self.numbers)

    def sample(self, number: int) -> Any:
        return rows([self.numbers[number - 1]])[0]


LONG = [i % len(SAMPLES) for i in range(90)]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("at", [3, 40, 45])
@pytest.mark.parametrize("kind", [Later, Telling, of_hub])
def test_a_whole_stream_goes_on(
    kind: Any, at: int, num_workers: int, tmp_path: Path, rank: int
) -> None:
    """Bit for bit, from among the samples that are compared, from after them, and at the end."""
    settings: dict[str, Any] = {
        "max_steps": 50, "save_strategy": "steps", "save_steps": at,
        "dataloader_num_workers": num_workers,
    }  # fmt: skip
    whole = trainer_of(tmp_path, kind(LONG), **settings)
    whole.train()
    settings["save_strategy"] = "no"
    again = trainer_of(tmp_path / "again", kind(LONG), **settings)
    again.train(str(tmp_path / f"checkpoint-{at}"))
    assert losses(again) == losses(whole)
    ours, theirs = whole_weights(again), whole_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.ranks(2, timeout=200)
@pytest.mark.parametrize("at", [3, 40])
@pytest.mark.parametrize("kind", [Later, Telling])
def test_a_resumed_run_looks_at_the_data_it_is_given(
    kind: Any, at: int, tmp_path: Path, rank: int
) -> None:
    """Split since then: found at the first step, or where the next epoch begins."""
    settings: dict[str, Any] = {"max_steps": at, "save_strategy": "steps", "save_steps": at}
    trainer_of(tmp_path, kind(LONG), **settings).train()
    split = trainer_of(tmp_path, kind(numbers_of(rank, 2, begin=20) * 3), max_steps=200)
    check_refused(lambda: split.train(str(tmp_path / f"checkpoint-{at}")), "the training data")
    if kind is Later:  # read from its beginning
        assert len(split.trained[0]) <= (8 if at == 3 else 1)


@pytest.mark.ranks(2)
def test_a_loader_that_takes_over_compares_on(rank: int) -> None:
    """As after a lack of memory: another micro-batch, inside of the same epoch."""
    from dstrain.data import (
        LoaderOptions,
        Topology,
        build_loader,
        detect_split,
        inherit_split,
        set_epoch,
        windows,
    )

    def loader_of(micro_batch: int) -> Any:
        data = Later(numbers_of(rank, 2, begin=20))
        return build_loader(
            data, Topology(micro_batch, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
        )

    earlier = loader_of(2)
    detect_split(earlier, what="the data")
    set_epoch(earlier, 0)
    steps = windows(earlier, 1)
    next(steps)
    steps.close()
    later = loader_of(1)
    inherit_split(later, earlier)
    set_epoch(later, 0, start=4)
    check_refused(lambda: list(windows(later, 1)), "the data")
