"""Streams that the user has split by rank, in a run that goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, whole_weights
from tests.distributed.split_data import (
    EVEN,
    UNEVEN,
    ClaimsLength,
    Part,
    everywhere,
    hub_part,
    rows,
    trainer_of,
)
from tests.distributed.streams import TellsPosition


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
    whole = trainer_of(tmp_path, ClaimsLength(EVEN, EVEN), **settings)
    with pytest.raises(DataError, match="came 2 parts, one for each rank in the checkpoint"):
        whole.train(str(tmp_path / "checkpoint-6"))
    whole.train(str(tmp_path / "checkpoint-12"))
    anew = trainer_of(tmp_path, ClaimsLength(EVEN, EVEN), ignore_data_skip=True, **settings)
    anew.train(str(tmp_path / "checkpoint-6"))
    assert everywhere(anew.trained[0])[:4] == [0, 1, 2, 3]


def test_another_number_of_ranks_is_told(tmp_path: Path) -> None:
    """Go on in the next epoch: the rest of one rank's part does not tell the rest of another's."""
    from tests.distributed.forked import run_job

    found = run_job("split", tmp_path, timeout=120)
    assert "the data came 2 parts, one for each rank in the checkpoint" in found["inside"]
    assert "comes 3 parts, one for each rank in this run" in found["inside"]
    assert found["between"] == ""
