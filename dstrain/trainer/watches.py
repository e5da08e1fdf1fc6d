"""Over what a trainer watches for ranks that do not come; one watch at a time (see ``stall``)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from dstrain.core.progress import Progress
from dstrain.trainer.stall import Place, StallWatch

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Outside:
    """What the watch sees where no training loop runs."""

    place: Place
    progress: Progress


@contextlib.contextmanager
def over(trainer: Any, what: str) -> Iterator[None]:
    """Watch a block, unless it stands in one that is watched already.

    No wait is cut short in it, however long it lasts on all ranks together. Where gloo gives up, it
    is said which rank did not come, and all end.

    Args:
        trainer: with its ``ranks``, ``state`` and ``args``.
        what: is done in the block, for messages.
    """
    if trainer.watch_for_ranks is not None:
        yield
        return
    run = _outside(what, step=trainer.state.global_step)
    watch = StallWatch(trainer.ranks, run, timeout_seconds=trainer.args.ddp_timeout)
    trainer.watch_for_ranks = watch
    try:
        with watch.watching():
            yield
    finally:
        trainer.watch_for_ranks = None


@contextlib.contextmanager
def following(trainer: Any, loop: Any) -> Iterator[None]:
    """Watch the steps of a training loop in a block inside ``over``, and then what ends training.

    Args:
        trainer: that the loop is of.
        loop: with its ``place`` and ``progress``.
    """
    watch: StallWatch = trainer.watch_for_ranks
    watch.follow(loop)
    try:
        yield
    finally:
        watch.follow(_outside("the end of training", step=loop.progress.step))


def watched(
    what: str,
) -> Callable[[Callable[Concatenate[Any, P], T]], Callable[Concatenate[Any, P], T]]:
    """Have a method of a trainer watched as a whole; ``what`` is done in it, for messages."""

    def decorate(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
        @functools.wraps(method)
        def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
            with over(self, what):
                return method(self, *args, **kwargs)

        return call

    return decorate


def _outside(what: str, *, step: int) -> Outside:
    run = Outside(Place(), Progress(step=step))
    run.place.enter(what)
    return run
