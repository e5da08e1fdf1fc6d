"""The length of a loader's epoch, and the position in it at which a loader begins or stands."""

from __future__ import annotations

from typing import Any

from dstrain.core.log import get_logger
from dstrain.core.seeds import derived_seed
from dstrain.data.loader import end_processes
from dstrain.data.order import RankBatchSampler
from dstrain.data.streams import RankStream

logger = get_logger(__name__)


def micro_steps(loader: Any) -> int | None:
    """Return the micro-steps of a whole epoch, or None for a stream without a length.

    The length of a stream is its ``__len__``; where ranks have parts of their own, the longest
    counts.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, RankBatchSampler):
        return len(sampler.whole())
    if isinstance(stream := getattr(loader, "dataset", None), RankStream):
        return stream.num_steps()
    try:
        return len(loader)
    except TypeError:
        return None


def num_samples(loader: Any) -> int | None:
    """Return the samples of the dataset behind a loader over all ranks; None without a length."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, RankStream):
        if dataset.split:
            lengths = [length for length in dataset.lengths if length is not None]
            return sum(lengths) if len(lengths) == len(dataset.lengths) else None
        dataset = dataset.source
    # torch's own IterableDataset has no length; wrappers of one (a shard) keep it in `dataset`.
    for found in (dataset, getattr(dataset, "dataset", None)):
        try:
            return len(found)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None


def set_epoch(
    loader: Any,
    epoch: int,
    *,
    start: int = 0,
    source: dict[str, Any] | None = None,
    trains: bool = True,
) -> None:
    """Point a loader at an epoch and at the first sample of it that is still to be used.

    Args:
        loader: of either kind, or one of the user's own.
        epoch: from 0.
        start: samples of the epoch that were used, over all ranks.
        source: what ``source_state`` gave there; without it a stream is read from its beginning.
        trains: whether to tell a dataset with a length too. It may be evaluated on in between.
    """
    for part in (getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)):
        if isinstance(part, (RankBatchSampler, RankStream)):
            if isinstance(part, RankStream):
                part.set_epoch(epoch, start=start, state=source)
            else:
                part.set_epoch(epoch, start=start)
                if trains:
                    _set_dataset_epoch(loader, epoch, sampler=part)
            # MicroBatchSeed in loader processes is that of the epoch, wherever the run began.
            seed = derived_seed(part.worker_seed, step=epoch, rank=part.topology.rank)
            loader.generator.manual_seed(seed)
            return
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        tell = getattr(part, "set_epoch", None)
        if tell is not None:
            tell(epoch)
            return


def _set_dataset_epoch(loader: Any, epoch: int, *, sampler: RankBatchSampler) -> None:
    """Tell a dataset with a length which epoch begins, as a curriculum needs to know.

    It may have another length then. Loader processes have a copy of it, and are started anew.
    """
    tell = getattr(loader.dataset, "set_epoch", None)
    if tell is None:
        return
    tell(epoch)
    end_processes(loader)
    before, now = sampler.order.num_samples, len(loader.dataset)
    if now != before:
        sampler.follow_length(now)
        logger.warning(
            "the dataset has %d samples in epoch %d, and had %d before: the run ends at the step "
            "that was computed at its start, so set max_steps to the one that you want",
            now,
            epoch,
            before,
        )


def keep_source_states(loader: Any) -> None:
    """Keep positions of the stream behind a loader from its next epoch on, for ``source_state``."""
    if isinstance(stream := getattr(loader, "dataset", None), RankStream):
        stream.keeps_states = True


def source_state(loader: Any, samples: int) -> dict[str, Any] | None:
    """Return the state of the stream behind a loader after ``samples`` samples of the epoch.

    ``samples`` counts those of all ranks. The state is the same whatever the topology, and on
    whichever rank, unless each rank has a part of its own. None where the dataset is no stream, or
    cannot tell its position exactly.
    """
    stream = getattr(loader, "dataset", None)
    return stream.state_at(samples) if isinstance(stream, RankStream) else None
