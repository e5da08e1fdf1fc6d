"""Letting one rank go first, with a wait that has no time limit and needs no process group."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from dstrain.core.errors import DstrainError, Problem
from dstrain.core.ranks import Ranks

_FOREVER = timedelta(days=365)


@contextlib.contextmanager
def first_turn(ranks: Ranks, *, per_node: bool = True, what: str = "work") -> Iterator[None]:
    """Run the body on the main rank before the others, so that they find what it has cached.

    The others wait at the launcher's key-value store, not in a collective: hours of preparation
    run into no time-out of the process group, which need not be there yet.

    Args:
        ranks: facts of this process.
        per_node: one main rank per machine (for machines that do not share a disk).
        what: the body in words, for the message when it fails.

    Raises:
        DstrainError: on the waiting ranks, when the main rank failed.
    """
    if ranks.world_size == 1:
        yield
        return
    store = _store(ranks.rank, ranks.world_size)
    turn = store.add(f"turns_of_{ranks.rank}", 1)  # the same on all ranks: each calls as often
    node = ranks.rank // ranks.local_world_size if per_node else 0
    key = f"turn_{turn}_{per_node}_{node}"
    if not (ranks.is_local_main if per_node else ranks.is_main):
        store.wait([key], _FOREVER)
        if store.get(key) != b"done":
            raise DstrainError(
                Problem(f"the main rank failed in: {what}", "its own message says how")
            )
        yield
        return
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        store.set(key, outcome)


@functools.cache
def _store(rank: int, world_size: int) -> Any:
    """Return the key-value store at the launcher's address, kept for the life of the process."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(
        rendezvous("env://", rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    )
    return PrefixStore("dstrain_turn", store)
