"""Comparison of samples between ranks during use of a stream that began alike on all ranks.

A stream that is split by rank may begin with the same samples everywhere: a header, or duplicates.
Ranks exchange for every micro-batch whether they have it; to that exchange each rank adds a digest
of all samples it has read, for the first samples of an epoch. This needs no extra reading and no
extra waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import broadcast_object, gather_objects
from dstrain.data.comparison.differences import Differences, FieldSummaries, SampleSummary
from dstrain.data.comparison.summaries import (
    DIFFERENT,
    MOST_SAMPLES,
    UNCLEAR,
    Finding,
    by_field,
    compare_again,
    differing_columns,
    digest_of,
    without_count,
)

logger = get_logger(__name__)

WATCHED_SAMPLES = 64
_FIRST_WINDOW = MOST_SAMPLES + 2  # samples
_LONG_WINDOW = 3 * MOST_SAMPLES
_NUM_BITS = 48
# Samples of rank 0 that must be at other positions for an error. Noise with a few hundred values
# would look the same, without a repeated value in 64 samples of either rank, in fewer than one of
# ten thousand streams.
_FEWEST_MOVED = 12

ReadAgain = Callable[[int], "list[Any] | None"]


class StreamWatch:
    """Comparison of running digests of the samples that ranks read, to detect different data.

    For each micro-step of the first ``WATCHED_SAMPLES`` samples each rank adds its digest, as 48
    zeros and ones, to a sum over ranks that is made in any case; sums other than 0 or the number of
    ranks mean that digests differ. The cost does not grow with the number of ranks. Only if digests
    differ are samples read again, and summaries sent: see ``compare_again``. This is repeated at
    most every eight samples, and without columns that turned out to be noise.

    Loader processes summarise the samples that they read, and send summaries with micro-batches.

    Attributes:
        columns: used keys of samples that are dicts; None for all.
        read_again: reads the given number of the epoch's first samples again.
        is_over: whether the comparison has ended.
    """

    def __init__(
        self,
        what: str,
        columns: Sequence[str] | None,
        read_again: ReadAgain,
        *,
        noisy: frozenset[str] = frozenset(),
    ) -> None:
        """Set up before any sample is read.

        Args:
            what: the data in words, for messages.
            columns: see above.
            read_again: see above.
            noisy: columns that are known to be noise.
        """
        self.columns = columns
        self.read_again = read_again
        self.is_over = False
        self._what, self._noisy = what, noisy
        self._begin_anew(num_steps=0)

    def _begin_anew(self, *, num_steps: int, chunk: int = 0) -> None:
        self._left = num_steps  # micro-steps whose digests are still to be sent
        self._chunk = chunk
        self._summaries: list[SampleSummary] = []
        self._num_in_digest = 0  # number of these that the digest includes
        # The following count whole chunks: at its end a stream may give a rank more samples than
        # another, but all ranks must act alike on these numbers.
        self._num_compared = 0
        self._num_alike = 0  # samples compared when digests were last equal
        self._num_judged = -MOST_SAMPLES  # samples compared when ranks last exchanged summaries
        self._digest = ""

    def begin(self, *, start: int, chunk: int) -> bool:
        """Begin an epoch; return whether to summarise its samples.

        Args:
            start: samples that are read and dropped, because they were used before.
            chunk: samples that ranks read for a micro-step.
        """
        if not self.is_over:
            num_steps = max(1, -(-(WATCHED_SAMPLES - start) // chunk))
            self._begin_anew(num_steps=num_steps, chunk=chunk)
        return not self.is_over

    def note(self, summaries: Sequence[SampleSummary]) -> None:
        """Store summaries of the samples that were read for a micro-step."""
        self._summaries += summaries

    def bits(self) -> list[int]:
        """Return this rank's digest after the latest micro-step as 0s and 1s; [] at the end."""
        if self.is_over or not self._left:
            return []
        self._left -= 1
        self._num_compared += self._chunk
        new, self._num_in_digest = self._summaries[self._num_in_digest :], len(self._summaries)
        self._digest = digest_of((self._digest, _sorted(by_field(new, self._noisy))))
        number = int(self._digest, 16)
        return [number >> bit & 1 for bit in range(_NUM_BITS)]

    def check_sums(
        self, sums: Sequence[float], *, world_size: int, ended: bool, group: Any
    ) -> None:
        """Check the sums over ranks of a micro-step's digests; called by all ranks alike.

        Args:
            sums: sums of ``bits`` over ranks.
            world_size: the number of ranks.
            ended: whether no rank has another micro-batch.
            group: process group of all ranks; None for the default group.

        Raises:
            DataError: ranks read different samples; raised on all ranks.
        """
        is_last = ended or not self._left
        if all(number in (0, world_size) for number in sums):
            self._num_alike = self._num_compared
        elif is_last or self._num_compared - self._num_judged >= MOST_SAMPLES:
            self._compare(group, is_last=is_last)
        if is_last and self._noisy:
            self._compare_order(group)
        if is_last:
            self.is_over = True
            self._begin_anew(num_steps=0)

    def _compare(self, group: Any, *, is_last: bool) -> None:
        """Determine whether ranks read different samples, or the same with noise; a collective.

        If samples cannot be read again, their first summaries are compared, once there are a few.

        Raises:
            DataError: ranks read different samples.
        """
        summaries = by_field(self._summaries, self._noisy)
        differing = differing_columns(summaries, group=group)
        few = self._num_compared - self._num_alike < MOST_SAMPLES + self._chunk
        number = len(self._summaries) + MOST_SAMPLES
        found = compare_again(
            summaries,
            lambda: self.read_again(number),
            self.columns,
            judge=find_other_samples,
            without=self._noisy,
            group=group,
            waits=few and not is_last,
        )
        if found is None:
            return
        if found.found == DIFFERENT:
            raise self._differs(found.why)
        if found.found == UNCLEAR and _is_main():
            logger.warning(
                "samples of %s differ between ranks after those that it begins with, and from one "
                "reading to the next: taken for noise on the same samples in the same order. A "
                "stream that is shuffled must be so with the same seed on all ranks",
                self._what,
            )
        self._noisy |= differing - found.rare
        self._digest, self._num_alike, self._num_judged = "", self._num_compared, self._num_compared

    def _compare_order(self, group: Any) -> None:
        """Check that differences taken for noise are not another order of samples; a collective.

        The main rank sends its summaries, whose size does not grow with the number of ranks.

        Raises:
            DataError: a rank reads the samples in another order.
        """
        mine = by_field(self._summaries)
        theirs = broadcast_object(mine, group=group)
        counts = gather_objects(num_moved(mine, theirs), group=group)
        most = max(counts)
        if most >= _FEWEST_MOVED:
            rank = counts.index(most)
            raise DataError(
                Problem(
                    f"{self._what} is read in another order on rank {rank} than on rank 0: {most} "
                    f"of its first {len(self._summaries)} samples are among those of rank 0, at "
                    "other places",
                    "each rank takes its share of a stream by the position of a sample: "
                    "some samples would be used twice and others never",
                    "shuffle it with the same seed on all ranks, or not at all; "
                    "dispatch_batches=True lets the main rank read a whole stream for all",
                )
            )

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


def num_moved(mine: FieldSummaries, theirs: FieldSummaries) -> int:
    """Count the samples of this rank that the main rank has read at another position.

    Equal values at different positions may be noise with few values, which then also occur twice on
    one rank. So if a rank has a sample twice, 0 is returned; also if an equal column shows that the
    order is the same.
    """
    fields = sorted(set(without_count(mine)) & set(theirs))
    mine, theirs = {f: mine[f] for f in fields}, {f: theirs[f] for f in fields}
    if not fields or Differences(mine, theirs).have_column_in_common():
        return 0
    here, there = [
        [repr(sample) for sample in zip(*summary.values(), strict=True)]
        for summary in (mine, theirs)
    ]
    places = {sample: place for place, sample in enumerate(there)}
    if len(places) < len(there) or len(set(here)) < len(here):
        return 0
    return sum(places.get(sample, place) != place for place, sample in enumerate(here))


def find_other_samples(mine: FieldSummaries, theirs: FieldSummaries) -> Finding | None:
    """Find the position from which a rank reads different samples than the main rank, or None.

    As a finding ends the run, it needs evidence that noise hardly gives: all of ten samples from
    the first difference on differ (of eight if there are no more), or half of 24 or more samples up
    to the last. Neither counts if a column is equal in them (``have_column_in_common``), nor the
    latter if samples between are equal (``come_together_after``).

    Samples that only one of two streams has are not compared: streams of different lengths are
    detected by the code that reads them to the end.
    """
    mine, theirs = without_count(mine), without_count(theirs)
    found = Differences(mine, theirs)
    starts = [place for place, differs in enumerate(found.differs) if differs]
    for first in starts:
        window = found.differs[first : first + _FIRST_WINDOW]
        if not (first == starts[0] and len(window) >= MOST_SAMPLES and all(window)):
            window = found.differs[first:]
            is_most = len(window) >= _LONG_WINDOW and 2 * sum(window) >= len(window)
            if not is_most or found.come_together_after(first):
                continue
        if not found.have_column_in_common(first, first + len(window)):
            many = f"{sum(window)} of the {len(window)} samples"
            return found.field_at(first), f"is not that of rank 0 in {many} from number {first} on"
    return None


def _sorted(summary: dict[str, Any]) -> list[Any]:
    return sorted(summary.items())


def _is_main() -> bool:
    import torch.distributed as dist

    return dist.get_rank() == 0
