"""Ranks in step on data without a common length: the end of an epoch that a rank does not reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from dstrain.data import lockstep
from dstrain.data.lockstep import RankPartSteps, SharedStreamSteps

SECONDS = 1.0


def shared_stream() -> SharedStreamSteps:
    return SharedStreamSteps(iter([("a", 2), ("b", 2)]))


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


@pytest.mark.ranks(2)
def test_an_epoch_is_closed_though_a_rank_is_lost(
    rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that fails does not wait for another one that hangs before its next micro-batch."""
    monkeypatch.setattr(lockstep, "_LAST_EXCHANGE", timedelta(seconds=SECONDS))
    store = dist.distributed_c10d._get_default_store()
    steps = shared_stream()
    steps.fetch()
    if rank == 0:
        steps.fetch()  # begins an exchange that rank 1 does not reach
        begun, before = time.monotonic(), num_groups()
        steps.close()
        assert time.monotonic() - begun < 10 * SECONDS
        assert num_groups() == before  # destroyed, it would wait in gloo
        store.set("closed", "")
    else:
        store.wait(["closed"], timedelta(seconds=30))
        steps.fetch()  # it comes after all
    steps.check_end()
    steps.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "make",
    [
        shared_stream,
        lambda: RankPartSteps(
            iter([("a", 2), ("b", 2)]),
            padding_of=lambda batch: batch,
            first_padding=lambda: None,
            num_samples=2,
        ),
    ],
    ids=["stream", "parts"],
)
def test_an_epoch_that_ends_early_leaves_no_group(
    rank: int, world_size: int, make: Callable[[], Any]
) -> None:
    before = num_groups()
    steps = make()
    assert num_groups() == before + 1
    steps.fetch()
    steps.fetch()
    steps.close()
    assert num_groups() == before
