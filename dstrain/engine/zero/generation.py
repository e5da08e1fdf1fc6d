"""Generation of text with partitioned weights, for which all ranks must generate together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from dstrain.core.errors import ModelError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import is_distributed
from dstrain.engine.zero.registration import StageRegistration

logger = get_logger(__name__)

_KEY = "dstrain-generate"
_REMIND_SECONDS = 30.0


@contextlib.contextmanager
def generating_together(what: str, *, patience_seconds: float) -> Iterator[None]:
    """Wait for all ranks, and let transformers keep them generating until the last has finished.

    Each token needs a gather of weights, in which all ranks take part.

    Args:
        what: the function that the user called, for messages.
        patience_seconds: how long to wait for the other ranks to call it.

    Raises:
        ModelError: not all ranks have called it in time.
    """
    _wait_for_all(what, patience_seconds)
    with StageRegistration(3):
        yield


def _wait_for_all(what: str, patience_seconds: float) -> None:
    """Wait until all ranks have called, by counting them in the store of the process group.

    Otherwise a rank that calls alone would wait in its first gather for ever, or that gather would
    be matched with another collective. The time grows with the number of ranks, since one process
    serves the store.

    Raises:
        ModelError: not all ranks have called in time.
    """
    if not is_distributed():
        return
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    calls = f"{_KEY}-calls-{rank}"
    number = store.add(calls, 1)
    meeting = f"{_KEY}-{number}"
    store.add(meeting, 1)
    started, pause, reminded = time.monotonic(), 0.001, False
    while store.add(meeting, 0) < world_size:
        waited = time.monotonic() - started
        if waited > patience_seconds:
            store.add(meeting, -1)
            store.add(calls, -1)
            raise _called_alone(what, rank, waited)
        if waited > _REMIND_SECONDS and not reminded:
            reminded = True
            logger.warning("rank %d waits in %s for the other ranks: %s", rank, what, _WHY)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    if rank == 0 and number > 1:  # no rank reads the counter of the previous call any more
        store.delete_key(f"{_KEY}-{number - 1}")


_WHY = "the weights are partitioned (ZeRO stage 3), so that all ranks must generate together"


def _called_alone(what: str, rank: int, waited: float) -> ModelError:
    """Return the error for a call that not all ranks have made."""
    return ModelError(
        Problem(
            f"rank {rank} called {what}, and after {waited:.0f} s not every other rank had",
            _WHY,
            "call it on all ranks, with a batch on each, and use the result on one; or load what "
            "save_model() wrote into a model of its own",
        )
    )
