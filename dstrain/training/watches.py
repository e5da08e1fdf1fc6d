"""Watching the work of a trainer for ranks that hang, with one watch at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dstrain.core.progress import Progress
from dstrain.core.ranks import Ranks
from dstrain.training.place import Place, Watched
from dstrain.training.stall import StallWatch

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="WatchesRanks")


@dataclass
class Outside:
    """Holds the place and progress that a watch sees where no training loop runs."""

    place: Place
    progress: Progress


class RankWatches:
    """Watches blocks, of which one may stand in another (see ``stall``)."""

    def __init__(self, ranks: Ranks) -> None:
        """Watch nothing yet.

        Args:
            ranks: rank and world size of this process.
        """
        self._ranks = ranks
        self._present: StallWatch | None = None
        self._place: Place | None = None

    @contextlib.contextmanager
    def over(self, what: str, *, step: int, timeout_seconds: float) -> Iterator[None]:
        """Watch a block, unless it stands in one that is watched already.

        No wait is cut short in it, however long it lasts on all ranks together. Where gloo gives
        up, it is said which rank did not come, and all end.

        Args:
            what: the work of the block, for messages.
            step: the step that training has come to.
            timeout_seconds: time limit of collectives.
        """
        if self._present is not None:
            yield
            return
        run = _outside(what, step=step)
        self._present = StallWatch(self._ranks, run, timeout_seconds=timeout_seconds)
        self._place = run.place
        try:
            with self._present.watching():
                yield
        finally:
            self._present = self._place = None

    def enter(self, what: str, *, in_step: bool = False, may_lag: bool = False) -> None:
        """Note that this rank has come to another place; see ``Place.enter``."""
        if self._place is not None:
            self._place.enter(what, in_step=in_step, may_lag=may_lag)

    @contextlib.contextmanager
    def following(self, loop: Watched) -> Iterator[None]:
        """Watch a training loop in a block inside ``over``, and then what ends training.

        Args:
            loop: the training loop, with its ``place`` and ``progress``.
        """
        assert self._present is not None
        self._present.follow(loop)
        self._place = loop.place
        try:
            yield
        finally:
            after = _outside("the end of training", step=loop.progress.step)
            self._present.follow(after)
            self._place = after.place


class WatchesRanks(Protocol):
    """Declares what an object must have for its methods to be watched."""

    def _watching_ranks(self, what: str) -> contextlib.AbstractContextManager[None]: ...


def watched(
    what: str,
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Have a method of a trainer watched as a whole; ``what`` is done in it, for messages."""

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(method)
        def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
            with self._watching_ranks(what):
                return method(self, *args, **kwargs)

        return call

    return decorate


def _outside(what: str, *, step: int) -> Outside:
    run = Outside(Place(), Progress(step=step))
    run.place.enter(what)
    return run
