"""Describing where a run stands, for messages about ranks that hang."""

from __future__ import annotations

import time
from typing import Protocol

from dstrain.core.progress import Progress


class Place:
    """Holds where the main thread is in a training, in words, and since when."""

    def __init__(self) -> None:
        """Begin outside of a step."""
        self.what, self.in_step, self.count, self.since = "the start", False, 0, time.monotonic()
        self.may_lag = False

    def enter(self, what: str, *, in_step: bool = False, may_lag: bool = False) -> None:
        """Note that the loop has come to another place.

        Args:
            what: the part of the run that begins, for messages.
            in_step: all ranks meet in it, so that to wait for one long is a failure.
            may_lag: ranks may be many such places behind others, so that one which goes on from
                place to place is waited for as long as the process group allows.
        """
        self.what, self.in_step, self.since = what, in_step, time.monotonic()
        self.may_lag = may_lag
        self.count += 1

    def moved_within(self, seconds: float) -> bool:
        """Tell whether the loop has come to this place in the last ``seconds``."""
        return time.monotonic() - self.since < seconds


class Watched(Protocol):
    """Declares what a watch reads of a training loop, or of other work."""

    @property
    def place(self) -> Place:
        """Return where the main thread is."""
        ...

    @property
    def progress(self) -> Progress:
        """Return how far training has come."""
        ...
