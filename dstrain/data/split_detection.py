"""Detection, before a loader is used, of data that the user has already split by rank.

Such data would be split again, and most of it never be used. A stream that was split is used as it
is; a dataset with a length that differs between ranks is refused. A stream that begins alike on all
ranks and differs later is refused too, when the difference is found in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import broadcast_object, gather_objects, is_distributed
from dstrain.data.columns import used_columns
from dstrain.data.comparison.stream_watch import StreamWatch
from dstrain.data.comparison.summaries import (
    ALIKE,
    DIFFERENT,
    MOST_SAMPLES,
    UNCLEAR,
    Verdict,
    compare,
)
from dstrain.data.order import RankBatchSampler
from dstrain.data.streams.dispatch import Dispatched
from dstrain.data.streams.rank_stream import RankStream, share_of

logger = get_logger(__name__)

_NUM_ROWS = 16  # rows to compare of a dataset with a length, from its first to its last

_SAME_DATA = (
    "pass the whole dataset on every rank (made with the same seed): dstrain gives each rank its "
    "share. Where a rank has only its own part, make a stream of it (to_iterable_dataset()), which "
    "is used as it is"
)


@dataclass(frozen=True)
class _Facts:
    """Facts that a rank knows about its data without reading any.

    Attributes:
        kind: "stream", "dispatched stream" or "dataset".
        length: number of samples; None where it is not known.
        share: (part, number of parts) if ``split_dataset_by_node`` made the data, else None.
        fingerprint: fingerprint of a ``datasets.Dataset``, the same for the same data; else None.
    """

    kind: str
    length: int | None
    share: tuple[int, int] | None
    fingerprint: str | None


def detect_split(loader: Any, *, what: str, epoch: int = 0, known_whole: bool = False) -> None:
    """Compare the data of all ranks and mark a stream that is split by rank; a collective.

    Reads at most 16 samples of a dataset with a length, and eight of a stream; an epoch in this
    process does not read those of a stream again. Each rank sends a few bytes per column. If these
    differ, samples are read twice more, and the main rank sends summaries of them. The gathered
    data grows with ranks x columns. A stream that begins alike on all ranks is compared further
    while it is used: see ``StreamWatch``.

    Args:
        loader: a loader of ``build_loader``.
        what: the data in words, for messages.
        epoch: the epoch that will be read first.
        known_whole: a checkpoint shows that all ranks read one stream; then no sample is read, as
            filling the buffer of a shuffle again would cost many samples.

    Raises:
        DataError: ranks have different data that cannot be used as it is; raised on all ranks.
    """
    stream = getattr(loader, "dataset", None)
    if isinstance(stream, RankStream):
        if stream.is_split_known:
            return
        stream.is_split_known = True
        if not is_distributed():
            _check_shares([share_of(stream.source)], what)
            return
        _detect_split_of_stream(loader, stream, what=what, epoch=epoch, known_whole=known_whole)
    elif is_distributed() and isinstance(getattr(loader, "batch_sampler", None), RankBatchSampler):
        _check_dataset(loader, what=what)


def inherit_split(loader: Any, earlier: Any) -> None:
    """Copy the findings of ``detect_split`` from an earlier loader of the same data."""
    stream, before = getattr(loader, "dataset", None), getattr(earlier, "dataset", None)
    if isinstance(stream, RankStream) and isinstance(before, RankStream):
        stream.split, stream.lengths = before.split, before.lengths
        if before.watch is not None:
            stream.watch, before.watch.read_again = before.watch, stream.read_again


def num_shares(loader: Any) -> int:
    """Return the number of parts of the user's data: the world size if it was split, else 1."""
    stream = getattr(loader, "dataset", None)
    return stream.topology.world_size if isinstance(stream, RankStream) and stream.split else 1


def _detect_split_of_stream(
    loader: Any, stream: RankStream, *, what: str, epoch: int, known_whole: bool
) -> None:
    dispatched = isinstance(stream.source, Dispatched)
    kind = "dispatched stream" if dispatched else "stream"
    facts = _gathered(_Facts(kind, stream.lengths[0], share_of(stream.source), None), what)
    if dispatched:
        # Only the main rank reads the stream, so only its length counts.
        stream.lengths = [broadcast_object(stream.lengths[0])]
        return
    world_size = stream.topology.world_size
    shares = [fact.share for fact in facts]
    if any(shares):
        _check_shares(shares, what)
        verdict = Verdict(DIFFERENT, "split_dataset_by_node")
    elif known_whole:
        verdict = Verdict(ALIKE)
    else:
        verdict = _compare(stream, loader, epoch=epoch)
    stream.split = verdict.found == DIFFERENT
    lengths = [fact.length for fact in facts]
    if stream.split:
        stream.lengths = lengths
    elif len(set(lengths)) > 1:
        raise DataError(
            Problem(
                f"the streams of {what} begin alike on all ranks and say different lengths",
                ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(lengths)),
                "give all ranks the same stream, or each a part of its own that begins otherwise",
            )
        )
    if not stream.split:
        columns = used_columns(stream.collate)
        stream.watch = StreamWatch(what, columns, stream.read_again, noisy=verdict.noisy)
    if stream.topology.rank == 0:
        _tell(verdict.found, verdict.why, what, world_size)


def _compare(stream: RankStream, loader: Any, *, epoch: int) -> Verdict:
    # A source that is its own iterator would go on in a loader process after the samples read here.
    unseen = stream.is_iterator and loader.num_workers
    goes_on = not loader.num_workers

    def read(again: bool) -> list[Any] | None:
        nonlocal goes_on
        goes_on = goes_on and not again
        # The first reading takes no more than the first micro-step does: a run that resumes after
        # that step skips this comparison, and must read the same samples.
        at_most = MOST_SAMPLES if again else min(MOST_SAMPLES, stream.topology.chunk)
        return None if unseen else stream.peek(epoch=epoch, at_most=at_most)

    found = compare(read, used_columns(stream.collate))
    if not goes_on:
        stream.forget_peek()
    return found


def _check_dataset(loader: Any, *, what: str) -> None:
    dataset = loader.dataset
    fingerprint = getattr(dataset, "_fingerprint", None)
    mine = _Facts("dataset", len(dataset), None, None if fingerprint is None else str(fingerprint))
    facts = _gathered(mine, what)
    lengths = [fact.length for fact in facts]
    if len(set(lengths)) > 1:
        said = ", ".join(f"{length} on rank {rank}" for rank, length in enumerate(lengths))
        raise _differs(what, f"its length is {said}")
    if facts[0].fingerprint is not None and len({fact.fingerprint for fact in facts}) == 1:
        return

    number, last = min(_NUM_ROWS, len(dataset)), len(dataset) - 1
    places = [i * last // max(1, number - 1) for i in range(number)]
    found = compare(lambda _: [dataset[i] for i in places], used_columns(loader.collate_fn))
    if found.found == DIFFERENT:
        raise _differs(what, found.why)


def _gathered(mine: _Facts, what: str) -> Sequence[_Facts]:
    facts = gather_objects(mine)
    kinds = [fact.kind for fact in facts]
    if len(set(kinds)) > 1:
        said = ", ".join(f"a {kind} on rank {rank}" for rank, kind in enumerate(kinds))
        raise _differs(what, f"it is {said}")
    return facts


def _check_shares(shares: Sequence[tuple[int, int] | None], what: str) -> None:
    """Check that data split by node has exactly one part for each rank, or is not split.

    Raises:
        DataError: the parts do not match the ranks.
    """
    if not any(shares):
        return
    number = len(shares)
    if {share for share in shares if share is not None} == {(r, number) for r in range(number)}:
        return
    said = ", ".join(
        f"rank {rank} has " + ("all" if share is None else f"part {share[0]} of {share[1]}")
        for rank, share in enumerate(shares)
    )
    raise DataError(
        Problem(
            f"{what} was split by node into other parts than one for each of {number} ranks",
            said,
            "split_dataset_by_node(dataset, rank=RANK, world_size=WORLD_SIZE) with the environment "
            "variables of the run; or leave it out: dstrain shares a whole stream out itself",
        )
    )


def _differs(what: str, why: str) -> DataError:
    return DataError(
        Problem(
            f"{what} is not the same on all ranks: {why}",
            "it was split by rank, or made at random without a seed. It would be shared out among "
            "the ranks again, and most of it never be used",
            _SAME_DATA,
        )
    )


def _tell(found: str, why: str, what: str, world_size: int) -> None:
    if found == DIFFERENT:
        logger.warning(
            "%s is already split by rank (%s): each rank uses all of its own part, and the order "
            "of samples depends on the number of ranks",
            what,
            why,
        )
    elif world_size > 8:
        logger.warning(
            "every one of the %d ranks reads the whole stream and keeps its share; for large "
            "worlds prepare the data first (without streaming)",
            world_size,
        )
    if found == UNCLEAR:
        logger.warning(
            "samples of %s differ between ranks, and from one reading to the next: taken for noise "
            "on the same samples in the same order. A stream that is shuffled must be so with the "
            "same seed on all ranks",
            what,
        )
