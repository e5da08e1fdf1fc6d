"""Whether streams that began alike go on alike: what ranks read first is compared as they use it.

A stream that is split by rank may begin with the same samples everywhere: a header, or duplicates.
Ranks tell each other of every micro-batch whether they have it; beside that each tells a digest of
all that it has read of the stream, until the first samples of one epoch are compared. Nothing is
read for it, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.data.alike import (
    APART,
    MOST_SAMPLES,
    UNTOLD,
    Part,
    SampleLook,
    differing_columns,
    digest_of,
    is_close,
    joined,
    second_look,
)

logger = get_logger(__name__)

WATCHED_SAMPLES = 64
_NUM_BITS = 48

ReadAgain = Callable[[int], "list[Any] | None"]


class StreamWatch:
    """Compares a running digest of what ranks read of a stream, and says where they part.

    Per micro-step of the first ``WATCHED_SAMPLES`` samples each rank adds 48 numbers to a sum that
    ranks make in any case: the bits of its digest, which are those of all ranks if each is counted
    by none or by all of them. That does not grow with the number of ranks. Only after digests that
    differ are samples read again, and looks sent: see ``second_look``.

    What is read by loader processes is looked at there, and what they saw comes with micro-batches.

    Attributes:
        columns: of samples that are dicts, those that are used; None for all.
        read_again: gives the first samples of the epoch anew, as many as it is asked for.
        is_over: whether all is compared that will be.
    """

    def __init__(
        self,
        what: str,
        columns: Sequence[str] | None,
        read_again: ReadAgain,
        *,
        noisy: frozenset[str] = frozenset(),
    ) -> None:
        """Args: the data, for messages; see above; columns that are known to be noise."""
        self.columns = columns
        self.read_again = read_again
        self.is_over = False
        self._what, self._noisy = what, noisy
        self._begin_anew(num_steps=0)

    def _begin_anew(self, *, num_steps: int) -> None:
        self._left = num_steps  # micro-steps that are to be told
        self._looks: list[SampleLook] = []
        self._num_told = 0  # of these, those in the digest
        self._num_alike = 0  # of these, those in which digests were last the same
        self._digest = ""

    def begin(self, *, start: int, chunk: int) -> bool:
        """Return whether the samples of an epoch are to be looked at, from its beginning on.

        Args:
            start: samples that are read and left out, because they were used before.
            chunk: samples that ranks read for one micro-step.
        """
        if not self.is_over:
            self._begin_anew(num_steps=max(1, -(-(WATCHED_SAMPLES - start) // chunk)))
        return not self.is_over

    def note(self, looks: Sequence[SampleLook]) -> None:
        """Take what a micro-step of the epoch read."""
        self._looks += looks

    def bits(self) -> list[int]:
        """What this rank tells with the micro-step fetched last; nothing once there is no need."""
        if self.is_over or not self._left:
            return []
        self._left -= 1
        new, self._num_told = self._looks[self._num_told :], len(self._looks)
        self._digest = digest_of((self._digest, _sorted(joined(new, self._noisy))))
        number = int(self._digest, 16)
        return [number >> bit & 1 for bit in range(_NUM_BITS)]

    def heed(self, sums: Sequence[float], *, world_size: int, ended: bool, group: Any) -> None:
        """Look at the sums of what all ranks told of one micro-step; all ranks call it alike.

        Args:
            sums: of ``bits``.
            world_size: ranks that told.
            ended: whether no rank has a micro-batch any more.
            group: of these ranks; None for that of the run.

        Raises:
            DataError: ranks read other samples; on all ranks.
        """
        is_last = ended or not self._left
        if all(number in (0, world_size) for number in sums):
            self._num_alike = self._num_told
        else:
            self._judge(group, is_last=is_last)
        if is_last:
            self.is_over = True
            self._begin_anew(num_steps=0)

    def _judge(self, group: Any, *, is_last: bool) -> None:
        """Tell whether ranks read other samples, or the same with noise; a collective.

        Samples that cannot be read again are judged by what they were, once there are a few.
        """
        looks = joined(self._looks, self._noisy)
        differing = differing_columns(looks, group=group)
        few = self._num_told - self._num_alike < MOST_SAMPLES
        number = len(self._looks) + MOST_SAMPLES
        found = second_look(
            looks,
            lambda: self.read_again(number),
            self.columns,
            apart=_parted,
            without=self._noisy,
            group=group,
            waits=few and not is_last,
        )
        if found is None:
            return
        if found.found == APART:
            raise self._differs(found.why)
        if found.found == UNTOLD and _is_main():
            logger.warning(
                "samples of %s differ between ranks after those that it begins with, and from one "
                "reading to the next: taken for noise on the same samples in the same order. A "
                "stream that is shuffled must be so with the same seed on all ranks",
                self._what,
            )
        self._noisy |= differing
        self._digest, self._num_alike = "", self._num_told

    def _differs(self, why: str) -> DataError:
        return DataError(
            Problem(
                f"{self._what} began alike on all ranks, and then is not the same: {why}",
                "a stream that begins alike is taken for the whole data, of which each rank keeps "
                "its share. It was split by rank, or ranks read it in different orders; part of it "
                "would never be used",
                "give every rank the whole stream, shuffled with the same seed: dstrain gives each "
                "rank its share. Or let split_dataset_by_node split it, which says so (a stream of "
                "your own: datasets.IterableDataset.from_generator), and it is used as it is. "
                "dispatch_batches=True lets the main rank read a whole stream for all",
            )
        )


def _parted(mine: list[Part | None], theirs: list[Part | None]) -> str:
    """Say from where on a field differs in at least half of the samples; rare noise does not.

    One sample alone says nothing, nor do those that only one of two streams has: where streams end
    apart is told by whoever reads them to the end.
    """
    differ = [not is_close(a, b) for a, b in zip(mine, theirs, strict=False)]
    for first in range(len(differ)):
        found = differ[first : first + MOST_SAMPLES]
        if found[0] and sum(found) >= max(2, len(found) / 2):
            many = f"{sum(found)} of the {len(found)} samples"
            return f"is not that of rank 0 in {many} from number {first} on"
    return ""


def _sorted(look: dict[str, Any]) -> list[Any]:
    return sorted(look.items())


def _is_main() -> bool:
    import torch.distributed as dist

    return dist.get_rank() == 0
