"""Evaluation batches of all ranks in step: as many on each, and all know which is the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import PendingSum, is_distributed
from dstrain.data.loader import MicroBatch, iterate, stand_in_for
from dstrain.data.order import RankBatchSampler


def in_step(loader: Any, *, device: Any) -> Iterator[tuple[MicroBatch, bool]]:
    """Micro-batches, and whether each is the last of all ranks.

    Where the loader's length is not known to be the same on all ranks (a stream, a user's own
    loader) they tell each other before each batch whether they have one more. A rank that has no
    more passes its last batch again, masked.

    Args:
        loader: of this rank.
        device: where ranks communicate.

    Raises:
        DataError: a rank has no batch at all while others have; on all ranks.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, RankBatchSampler):
        num_steps = len(sampler)
        for step, (micro_batch, _) in enumerate(iterate(loader)):
            yield micro_batch, step == num_steps - 1
        return
    batches = (micro_batch for micro_batch, _ in iterate(loader))
    coming = next(batches, None)
    if 0 < (number := _how_many(coming is not None, device)) < _how_many(True, device):
        raise DataError(
            Problem(
                f"only {number} ranks have evaluation data",
                "a rank without a batch cannot take part in the forward passes of the others",
                "give every rank a batch, or pass the dataset and let dstrain build the loader",
            )
        )
    while number:
        if coming is not None:
            present, spare = coming, stand_in_for(coming)
            coming = next(batches, None)
        else:
            present = stand_in_for(spare)
        number = _how_many(coming is not None, device)
        yield present, not number


def _how_many(have: bool, device: Any) -> int:
    """Ranks that say yes; a collective."""
    return int(PendingSum(float(have), device=device).get()) if is_distributed() else int(have)
