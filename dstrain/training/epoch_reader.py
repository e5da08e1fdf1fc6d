"""Reading a loader epoch by epoch, and recording what a checkpoint needs to resume inside one."""

from __future__ import annotations

from collections.abc import Iterator

from dstrain.core.log import get_logger
from dstrain.core.progress import Progress
from dstrain.core.ranks import Ranks
from dstrain.core.seeds import random_state
from dstrain.data import (
    AheadHooks,
    Window,
    fetches_ahead,
    is_dstrain_loader,
    keep_source_states,
    num_shares,
    set_epoch,
    source_state,
    windows,
)
from dstrain.training.resume import Resumption
from dstrain.training.types import PlainState

logger = get_logger(__name__)


class EpochReader:
    """Gives the windows of micro-batches of one epoch after the other.

    Attributes:
        random_ahead: this rank's random state before it fetched the first micro-batch of the next
            window; None where it has fetched none.
    """

    def __init__(
        self, loader: object, ranks: Ranks, *, saves: bool, resumption: Resumption | None
    ) -> None:
        """Prepare to read.

        Args:
            loader: this rank's loader.
            ranks: rank and world size of this process.
            saves: whether checkpoints may be written, so that states must be kept.
            resumption: the checkpoint's position, or None; used by the first epoch that is read.
        """
        self.loader = loader
        self.random_ahead: PlainState | None = None
        self._ranks, self._saves, self._resumption = ranks, saves, resumption

    def begin(self, progress: Progress) -> None:
        """Set the loader to the epoch and sample that a run has come to."""
        source = None if self._resumption is None else self._resumption.position.source
        if self._saves:
            keep_source_states(self.loader)
        set_epoch(self.loader, progress.epoch, start=progress.samples_in_epoch, source=source)

    def windows(self, accumulation: int, *, steps_in_epoch: int) -> Iterator[Window]:
        """Yield the windows of an epoch; in a resumed run, those that are left of the first one.

        Args:
            accumulation: micro-batches of a full window.
            steps_in_epoch: optimizer steps that the epoch has had already.
        """
        resumption, self.random_ahead = self._resumption, None
        self._resumption = None
        if not fetches_ahead(self.loader):
            if resumption is not None:
                resumption.restore_random()
            return windows(self.loader, accumulation)
        hooks = AheadHooks(before=self._note_random if self._saves else None)
        skip = 0
        if resumption is not None:
            if resumption.random_ahead is None:
                resumption.restore_random()
            else:
                hooks.before_first = resumption.restore_random_ahead
                hooks.after_first = resumption.restore_random
            if not is_dstrain_loader(self.loader):
                skip = steps_in_epoch * accumulation
                self._warn_of_replay(skip)
        return windows(self.loader, accumulation, skip=skip, ahead=hooks)

    def restore_random(self) -> None:
        """Restore the random state of the checkpoint that the run goes on from."""
        assert self._resumption is not None
        self._resumption.restore_random()

    def take_up_random_ahead(self) -> None:
        """Take over ``random_ahead`` of the checkpoint from which the run resumes."""
        assert self._resumption is not None
        self.random_ahead = self._resumption.random_ahead

    def skip_resumed_epoch(self) -> None:
        """Go on to the next epoch: the one of the checkpoint has no samples left."""
        self._resumption = None

    def source(self, samples_in_epoch: int) -> PlainState | None:
        """Return the state of the stream behind the loader; the saved one until it is read."""
        if self._resumption is not None:
            return self._resumption.position.source
        return source_state(self.loader, samples_in_epoch)

    @property
    def shares(self) -> int | None:
        """Return the parts that the data comes in: as many as ranks where a user has split it."""
        return num_shares(self.loader)

    def _note_random(self) -> None:
        self.random_ahead = random_state()

    def _warn_of_replay(self, num_micro_batches: int) -> None:
        if num_micro_batches and self._ranks.is_main:
            logger.warning(
                "%d micro-batches are read and dropped: only loaders that dstrain builds can start "
                "inside an epoch",
                num_micro_batches,
            )
