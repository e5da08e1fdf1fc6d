"""The main rank goes first: the others find what it has cached, or the error that it met."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dstrain.core.errors import DataError, DstrainError, Problem
from dstrain.core.main_first import _as_text, _from_text, main_first
from dstrain.core.ranks import Ranks, broadcast_object, launched_ranks


@pytest.mark.ranks(2)
@pytest.mark.parametrize("per_node", [True, False])
def test_the_others_find_what_the_main_rank_has_cached(
    rank: int, world_size: int, tmp_path: Path, per_node: bool
) -> None:
    folder = Path(broadcast_object(str(tmp_path)))
    for turn in range(3):
        file = folder / f"cache{turn}"
        with main_first(launched_ranks(), per_node=per_node):
            if rank == 0:
                time.sleep(0.1)
                file.touch()
            assert file.exists()


def fail_first(ranks: Ranks, error: Exception, *, fails: bool) -> None:
    """Go first, or after the ranks that fail."""
    with main_first(ranks, what="reading"):
        assert fails or ranks.is_local_main, "ran after the main rank failed"
        if fails:
            raise error


@pytest.mark.ranks(2)
def test_an_error_of_the_main_rank_is_raised_on_all(rank: int, world_size: int) -> None:
    with pytest.raises(DataError, match="disk full"):
        fail_first(launched_ranks(), DataError(Problem("disk full")), fails=rank == 0)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("both", [False, True])
def test_an_error_of_one_machine_reaches_the_others(rank: int, world_size: int, both: bool) -> None:
    machine = Ranks(rank, 0, 2, 1)
    start = time.monotonic()
    with pytest.raises(DataError, match="no such corpus"):
        fail_first(machine, DataError(Problem("no such corpus")), fails=both or rank == 1)
    assert time.monotonic() - start < 5, "nobody waits for a rank that has an error of its own"


@pytest.mark.ranks(2)
def test_another_kind_of_error_is_told_in_words(rank: int, world_size: int) -> None:
    kind = KeyError if rank == 0 else DstrainError
    with pytest.raises(kind) as caught:
        fail_first(launched_ranks(), KeyError("name"), fails=rank == 0)
    assert rank == 0 or "the main rank failed in: reading" in str(caught.value)


def test_an_error_comes_to_other_ranks_as_it_was() -> None:
    problems = [Problem("a", "b", "c"), Problem("d")]
    for error in (DataError(problems), DataError(problems, title="x"), DstrainError("y")):
        same = _from_text(_as_text(error).encode())
        assert (type(same), str(same)) == (type(error), str(error))
