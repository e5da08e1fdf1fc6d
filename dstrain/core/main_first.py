"""Running a body on the main rank first; the wait has no time limit and needs no process group."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from dstrain.core import errors
from dstrain.core.errors import DstrainError, Problem
from dstrain.core.ranks import Ranks

_POLL_SECONDS = 0.02, 1.0  # between two polls of the store: at first, and at most
# Time that a failed rank gives the others to read its error: the store may end with that rank.
_READ_SECONDS = 10.0


@contextlib.contextmanager
def main_first(ranks: Ranks, *, per_node: bool = True, what: str = "work") -> Iterator[None]:
    """Run the body on the main rank before the other ranks, which then find its cached results.

    The other ranks wait at the launcher's key-value store, not in a collective: hours of
    preparation cause no timeout of the process group, which need not exist yet. The data that each
    rank stores does not grow with the number of ranks.

    Args:
        ranks: facts of this process.
        per_node: run first on one rank of each machine (for machines that do not share a disk); all
            ranks wait until the body has ended on every machine.
        what: the body in words, for the message when it fails.

    Raises:
        DstrainError: the body failed on a main rank; raised on every rank, with the problems of
            that rank's error where it is a DstrainError.
    """
    if ranks.world_size == 1:
        yield
        return
    store = _store(ranks.rank, ranks.world_size)
    # The number of the call is the same on all ranks, as each rank calls equally often.
    call = _Call(store, store.add(f"turns_of_{ranks.rank}", 1), ranks.world_size)
    is_main = ranks.is_local_main if per_node else ranks.is_main
    call.enter(is_main=is_main)
    if not is_main:
        call.wait()
        yield
        return
    try:
        yield
    except DstrainError as error:
        call.fail(error)
        raise
    except BaseException:
        problem = Problem(f"the main rank failed in: {what}", "its own message says how")
        call.fail(DstrainError(problem))
        raise
    call.finish()
    call.wait()


class _Call:
    """Counters of one call of ``main_first`` in the store: ranks that entered, finished, failed."""

    def __init__(self, store: Any, number: int, world_size: int) -> None:
        self._store, self._number, self._world_size = store, number, world_size

    def enter(self, *, is_main: bool) -> None:
        """Count this rank as arrived, and as a main rank where it is one."""
        self._add("mains", is_main)
        self._add("entered", True)
        self._release_if_done()

    def finish(self) -> None:
        """Count a main rank that has run its body."""
        self._add("finished", True)
        self._release_if_done()

    def fail(self, error: DstrainError) -> None:
        """Store an error for the other ranks, and give them some time to read it."""
        self._store.set(self._key("failure"), _as_text(error))
        self._store.set(self._key("released"), "")
        self._add("read", True)
        until = time.monotonic() + _READ_SECONDS
        while self._add("read", False) < self._world_size and time.monotonic() < until:
            time.sleep(_POLL_SECONDS[0])

    def wait(self) -> None:
        """Wait until all main ranks have finished.

        Raises:
            DstrainError: a main rank has failed.
        """
        pause, longest = _POLL_SECONDS
        while not self._store.check([self._key("released")]):
            time.sleep(pause)
            pause = min(2 * pause, longest)
        if self._store.check([self._key("failure")]):
            error = _from_text(self._store.get(self._key("failure")))
            self._add("read", True)
            raise error

    def _release_if_done(self) -> None:
        """Release all ranks once every rank has entered and every main rank has finished.

        The rank whose count completes the last of these sees both, so that no release is missed.
        """
        has_all = self._add("entered", False) == self._world_size
        if has_all and self._add("finished", False) == self._add("mains", False):
            self._store.set(self._key("released"), "")

    def _add(self, name: str, counts: bool) -> int:
        return int(self._store.add(self._key(name), int(counts)))

    def _key(self, name: str) -> str:
        return f"turn_{self._number}_{name}"


def _as_text(error: DstrainError) -> str:
    """Return an error as JSON; ``_from_text`` restores its class and message."""
    message = str(error)
    has_title = len(error.problems) != 1 or message != str(error.problems[0])
    return json.dumps(
        {
            "kind": type(error).__name__,
            "title": message.partition("\n")[0].removesuffix(":") if has_title else "",
            "problems": [asdict(problem) for problem in error.problems],
        }
    )


def _from_text(text: bytes) -> DstrainError:
    told = json.loads(text)
    kind = getattr(errors, told["kind"], DstrainError)
    problems = [Problem(**problem) for problem in told["problems"]]
    error: DstrainError = kind(problems, title=told["title"])
    return error


@functools.cache
def _store(rank: int, world_size: int) -> Any:
    """Return the key-value store at the launcher's address, kept for the life of the process."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(
        rendezvous("env://", rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    )
    return PrefixStore("dstrain_turn", store)
