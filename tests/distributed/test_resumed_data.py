"""Data of a resumed run: loaders, random collators, streams; and no sample is read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.resumed_runs import Stream, check, masking_collate, run, run_file
from tests.distributed.streams import TellsPosition
from tests.models import RaggedTokens


def masking_trainer() -> Any:
    """Return a trainer class with that collator."""
    from dstrain import Trainer

    class Masking(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "data_collator": masking_collate})

    return Masking


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("data", ["samples", "stream"])
@pytest.mark.parametrize(("at", "workers"), [(4, 0), (6, 0), (4, 2)])
def test_a_collator_that_draws_random_numbers(
    data: str, at: int, workers: int, tmp_path: Path, rank: int
) -> None:
    """The next micro-batch of a stream has been fetched when a checkpoint is taken.

    Loader processes are ahead too, and those of the run that goes on begin in another place.
    """
    more: dict[str, Any] = {"data": Stream(22), "max_steps": 12} if data == "stream" else {}
    check(
        tmp_path, rank, at, stage=2, cls=masking_trainer(), dataloader_num_workers=workers, **more
    )


@pytest.mark.ranks(2, timeout=300)
def test_a_loader_of_the_users_own(tmp_path: Path, rank: int, caplog: Any) -> None:
    """It can only be read from its beginning, which the log says; samples and noise are right."""
    from torch.utils.data import DataLoader, DistributedSampler

    from dstrain import Trainer

    data = RaggedTokens(24)

    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            sampler = DistributedSampler(data, seed=3)
            return DataLoader(data, batch_size=2, collate_fn=masking_collate, sampler=sampler)

    check(tmp_path, rank, 4, stage=2, cls=OwnLoader, gradient_accumulation_steps=1)
    assert ("4 micro-batches are read and dropped" in caplog.text) is (rank == 0)


@pytest.mark.ranks(2, timeout=300)
def test_a_resume_reads_no_sample_that_was_used(tmp_path: Path) -> None:
    """So the time to its first step does not grow with how far the run was.

    A few samples are looked at in any run, which tell whether all ranks have the same data.
    """
    looked_at = 16

    class Counted(RaggedTokens):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    settings = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 1}
    run(tmp_path, data=Counted(44), **settings)
    assert Counted.reads == 22 + looked_at
    Counted.reads = 0
    run(tmp_path / "again", resume=str(tmp_path / "checkpoint-10"), data=Counted(44), **settings)
    assert Counted.reads == 2 + looked_at


class Telling(TellsPosition, Stream):
    """A stream that knows where it is."""

    def num_samples(self) -> int:
        return len(self.samples)

    def sample(self, number: int) -> Any:
        return self.samples[(number * 5 + self.epoch) % len(self.samples)]


@pytest.mark.ranks(2, timeout=300)
def test_a_resume_of_a_stream_that_knows_its_position(tmp_path: Path, rank: int) -> None:
    """It reads no sample that was used either, in a second epoch, at the noise of the whole run."""
    settings = {"stage": 2, "max_steps": 10, "dataloader_drop_last": True}
    Telling.reads = 0
    check(tmp_path, rank, 8, data=Telling(22), **settings)
    source = run_file(tmp_path / "whole" / "checkpoint-8")["position"]["source"]
    assert source == {"kind": "Telling", "state": {"given": 12}}
    assert Telling.reads == 2 * 22 + 10


@pytest.mark.ranks(2, timeout=300)
def test_a_stream_read_by_two_loader_processes(tmp_path: Path, rank: int) -> None:
    """Each of them reads the whole stream, which is begun in both where it was."""
    settings = {"stage": 2, "max_steps": 10, "dataloader_num_workers": 2, "cls": masking_trainer()}
    check(tmp_path, rank, 8, data=Telling(22), **settings)
    source = run_file(tmp_path / "whole/checkpoint-8")["position"]["source"]
    assert source == {"kind": "Telling", "state": {"given": 8}}
