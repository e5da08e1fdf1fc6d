"""Ending a run that stands still because a rank does not come to a collective, and naming it.

DeepSpeed's all-reduce in shared memory waits for ever, gloo and NCCL give up after ``ddp_timeout``
and do not know for whom they waited. A thread of each rank looks at the main thread once a second.
Where that has been in one collective of a training step for ``ddp_timeout`` seconds, the ranks tell
each other by the store of the process group where they stand, and all end.

A rank that makes progress sends nothing. One that has made none for half of ``ddp_timeout`` asks
for one key every few seconds, on a connection of its own, whatever the number of ranks; all of them
are then ranks / 5 small requests a second to the store. Only when the run is lost does one rank
read a key of every rank, once.

Nothing is measured outside of a step and of the batches of an evaluation. The preparation of
training, metrics, a checkpoint or a callback may last as long as it does on all ranks together; a
rank that stays in one while the others are in the next step is one that does not come. Where gloo
itself gives up, ranks tell each other in the same way. A rank that goes on from batch to batch of
an evaluation is waited for, however far it is behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from dstrain.core.errors import Problem
from dstrain.core.launcher import note_end
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, named_ranks
from dstrain.core.stop import STALLED
from dstrain.engine import unlink_shared_memory
from dstrain.training.frames import collective_of, is_debugged, line_of
from dstrain.training.place import Watched
from dstrain.training.types import PlainState

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

logger = get_logger(__name__)

_LOOK_SECONDS = 1.0
_ASK_SECONDS = 5.0
_ANSWER_SECONDS = 8.0  # longer than the time between two questions
_STORE_SECONDS = 5.0
_VERDICT_SECONDS = 20.0
_MOST_SECONDS = 60.0  # for all of the above
_MOST_LINES = 16
_TIMED_OUT = ("Timed out waiting", "collective operation timeout")
_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class StallWatch:
    """Watches the main thread of a run; ``watching`` is entered by all ranks."""

    def __init__(self, ranks: Ranks, loop: Watched, *, timeout_seconds: float) -> None:
        """Prepare to watch.

        Args:
            ranks: rank and world size of this process.
            loop: the training loop, or other work, with its ``place`` and ``progress``.
            timeout_seconds: how long a rank may keep the others waiting in a step.
        """
        self._ranks, self._loop, self._timeout = ranks, loop, timeout_seconds
        self._ended, self._must_tell = threading.Event(), threading.Event()
        self._main = threading.get_ident()
        self._base: Store | None = None
        self._store: Store | None = None
        self._frame: FrameType | None = None
        self._waits_since = self._asked = 0.0
        self._count = self._excused = -1
        self._waits_in = ""
        self._deciding = self._judges = self._store_is_lost = False

    def follow(self, loop: Watched) -> None:
        """Watch something else from here on, with its own ``place`` and ``progress``."""
        self._loop, self._frame = loop, None
        self._count = self._excused = -1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block; an error in it that is a consequence is left to the watch."""
        if self._ranks.world_size == 1:
            yield
            return
        import torch.distributed as dist

        # Ranks that run out of memory form their groups anew, in between have none, and keep this.
        self._base = dist.distributed_c10d._get_default_store()
        thread = threading.Thread(target=self._look, name="dstrain-stall", daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            self._explain(error, thread)
            raise
        finally:
            self._ended.set()
            self._must_tell.set()
            thread.join(_STORE_SECONDS)
            self._frame = None

    def _explain(self, error: RuntimeError, thread: threading.Thread) -> None:
        """Let the watch end the process where a collective failed because a rank did not come."""
        text = str(error)
        if any(sign in text for sign in _TIMED_OUT):
            self._waits_in = self._waits_in or "a collective"
            self._must_tell.set()
            thread.join(_MOST_SECONDS)
        elif self._deciding and any(sign in text for sign in _LOST):
            thread.join(_MOST_SECONDS)

    # --- the thread ------------------------------------------------------------------------------

    def _look(self) -> None:
        while not self._must_tell.wait(_LOOK_SECONDS):
            if self._has_waited() or self._is_asked():
                self._decide_or_end()
        if not self._ended.is_set():
            self._decide_or_end()

    def _decide_or_end(self) -> None:
        verdict = self._within(_ANSWER_SECONDS + _VERDICT_SECONDS, self._decide)
        if verdict is None:
            self._end(self._no_store())
        elif verdict:
            self._end(verdict if self._judges else "")
        self._excused = -1 if self._loop.place.may_lag else self._loop.place.count
        self._waits_since = time.monotonic()
        self._deciding = False

    def _within(self, seconds: float, ask: Callable[[], T]) -> T | None:
        """Return what ``ask`` finds in the store; None where the store does not answer.

        torch's client waits without limit for a server whose process has stopped, so each question
        has a thread of its own; after the first without an answer there are no more.
        """
        found: list[T] = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # torch's errors of a store
                found.append(ask())

        if not self._store_is_lost:
            thread = threading.Thread(target=run, name="dstrain-stall-store", daemon=True)
            thread.start()
            thread.join(seconds)
            self._store_is_lost = not found
        return found[0] if found else None

    def _has_waited(self) -> bool:
        """Tell whether the main thread has been in one collective of a step too long."""
        place = self._loop.place
        now = time.monotonic()
        if place.count != self._count or not place.in_step:
            self._count, self._frame = place.count, None
            return False
        if now - place.since < min(5.0, self._timeout / 4) or self._excused == place.count:
            return False
        # The frame is kept, so that no other can be taken for it.
        frame = collective_of(sys._current_frames().get(self._main))
        if frame is None or frame is not self._frame:
            self._frame, self._waits_since = frame, now
        self._waits_in = "" if frame is None else frame.f_code.co_name
        return frame is not None and now - self._waits_since > self._timeout

    def _is_asked(self) -> bool:
        """Tell whether another rank has waited too long while this one makes no progress either.

        Where ranks may lag, one that makes progress is asked too: it may be far behind.
        """
        now, place = time.monotonic(), self._loop.place
        goes_on = place.moved_within(self._timeout / 2) and not place.may_lag
        if goes_on or now - self._asked < _ASK_SECONDS:
            return False
        self._asked = now

        def ask() -> bool:
            store = self._connect()
            return bool(store.check([f"{self._round(store)}-asked"]))

        return bool(self._within(2 * _STORE_SECONDS, ask))

    def _decide(self) -> str:
        """Tell the store where this rank stands; return the message that was decided, "" to go on.

        Raises:
            RuntimeError: the rank that was to tell has not.
        """
        self._deciding = True
        store = self._connect()
        number, rank = self._round(store), self._ranks.rank
        store.set(f"{number}-at-{rank}", json.dumps(self._standing()))
        store.set(f"{number}-asked", "")
        key = f"{number}-verdict"
        self._judges = store.add(f"{number}-judge", 1) == 1
        if self._judges:
            verdict = self._judge(store, number)
            store.set(key, verdict)
            if not verdict:
                store.add("round", 1)
            return verdict
        until = time.monotonic() + _VERDICT_SECONDS
        while not store.check([key]):
            if time.monotonic() > until:
                raise RuntimeError
            time.sleep(0.2)
        return str(store.get(key).decode())

    def _judge(self, store: Store, number: int) -> str:
        """Read where all ranks stand; return the message, "" where the run may go on.

        Grows with the number of ranks, on this one, once.
        """
        keys = [f"{number}-at-{rank}" for rank in range(self._ranks.world_size)]
        place = self._loop.place.count
        until = time.monotonic() + _ANSWER_SECONDS
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.2)
        standings = {
            rank: json.loads(store.get(key).decode())
            for rank, key in enumerate(keys)
            if store.check([key])
        }
        if self._loop.place.count != place:
            return ""  # the one that was late has come
        busy = [rank for rank, standing in standings.items() if standing["debugger"]]
        if busy:
            logger.warning("rank %s is in a debugger: the others go on waiting", busy[0])
            return ""
        gave_up = any(standing["gave_up"] for standing in standings.values())
        if (
            self._loop.place.may_lag
            and not gave_up
            and any(s["goes_on"] for s in standings.values())
        ):
            return ""  # the collective has a longer limit than a step, and the late rank comes
        return str(self._error(standings))

    def _error(self, standings: dict[int, PlainState]) -> Problem:
        size = self._ranks.world_size
        silent = [rank for rank in range(size) if rank not in standings]
        away = [rank for rank, at in standings.items() if not at["waits_in"]]
        if not silent and not away:
            first = min(at["step"] for at in standings.values())
            away = [rank for rank, at in standings.items() if at["step"] == first]
            away = away if len(away) < size else []
        missing = sorted([*silent, *away])
        lines = []
        for rank in missing[:_MOST_LINES]:
            lines.append(f"  rank {rank}: {_words(standings.get(rank))}")
        if len(missing) > _MOST_LINES:
            lines.append(f"  and {len(missing) - _MOST_LINES} more")
        others: dict[str, list[int]] = {}
        for rank, at in standings.items():
            if rank not in missing:
                others.setdefault(_words(at), []).append(rank)
        for words, found in list(others.items())[:_MOST_LINES]:
            lines.append(f"  {named_ranks(found)}: {words}")
        for_whom = named_ranks(missing) if missing else "each other, in different collectives"
        return Problem(
            f"the ranks waited {self._timeout:.0f} s (ddp_timeout) for {for_whom}",
            "all are needed there; they stand here:\n" + "\n".join(lines),
            "look for what keeps that rank there (a loop, a lock, a file or network that does not "
            "answer, a machine that is gone), or raise ddp_timeout where it is only slow; "
            "resume_from_checkpoint='auto' goes on from the newest checkpoint",
        )

    def _no_store(self) -> str:
        """Say what is known where the store of the process group does not answer."""
        return str(
            Problem(
                f"rank {self._ranks.rank} waited {self._timeout:.0f} s (ddp_timeout) for others, "
                "and rank 0 does not answer",
                f"rank {self._ranks.rank}: {_words(self._standing())}; rank 0 holds the store in "
                "which ranks say where they stand",
                "look at rank 0: its process has stopped, or its machine cannot be reached; "
                "resume_from_checkpoint='auto' goes on from the newest checkpoint",
            )
        )

    def _standing(self) -> PlainState:
        """Return where this rank is, and whether it waits there."""
        frame = sys._current_frames().get(self._main)
        in_collective = collective_of(frame) is not None or self._must_tell.is_set()
        waits_in = (self._waits_in or "a collective") if in_collective else ""
        return {
            "step": self._loop.progress.step,
            "in_step": self._loop.place.in_step and not self._loop.place.may_lag,
            "what": self._loop.place.what,
            "waits_in": waits_in,
            "line": line_of(frame),
            "gave_up": self._must_tell.is_set(),
            "goes_on": not in_collective and self._loop.place.moved_within(self._timeout),
            "debugger": is_debugged(frame),
        }

    def _connect(self) -> Store:
        """Return a second connection to the store; the main thread may be in a call of its own."""
        if self._store is None:
            import torch.distributed as dist

            store: Any = self._base
            while isinstance(store, dist.PrefixStore):
                store = store.underlying_store
            limit = timedelta(seconds=_STORE_SECONDS)
            if isinstance(store, dist.TCPStore):
                store = dist.TCPStore(
                    store.host, store.port, None, False, timeout=limit, wait_for_workers=False
                )
            else:
                store = store.clone()
                store.set_timeout(limit)
            self._store = dist.PrefixStore("dstrain-stall", store)
        return self._store

    def _round(self, store: Store) -> int:
        """Return how often all ranks have been asked and went on."""
        return int(store.add("round", 0))

    def _end(self, told: str) -> None:
        """End the process; the main thread cannot, as it waits in C++ code."""
        if told:
            print(f"\ndstrain: error: {told}", file=sys.stderr, flush=True)
        if told or self._ranks.is_main:
            time.sleep(2 * _LOOK_SECONDS)  # others still ask for the verdict in rank 0's store
        unlink_shared_memory()
        note_end(STALLED)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(STALLED)


def _words(standing: PlainState | None) -> str:
    """Say in one line where a rank stands."""
    if standing is None:
        return "has not answered: its process has stopped or is gone, or just now goes on"
    done = standing["step"]
    when = f"step {done + 1}" if standing["in_step"] else f"after step {done}"
    where = f"{when}, {standing['what']}"
    if standing["waits_in"]:
        return f"{where}, waits in {standing['waits_in']}"
    return f"{where}, at {standing['line']}"
