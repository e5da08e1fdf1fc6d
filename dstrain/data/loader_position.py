"""Length of a loader's epoch, and setting and saving of the position inside it."""

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

    The length of a stream is its ``__len__``; if each rank has a part of the data, the longest part
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
    """Return the number of samples of a loader's dataset over all ranks; None without a length."""
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
    """Set the epoch that a loader reads next, and the number of its samples to skip.

    Args:
        loader: a loader of ``build_loader``, or one of the user's own.
        epoch: index of the epoch, from 0.
        start: samples of the epoch that were used already, over all ranks.
        source: result of ``source_state`` at ``start``; without it a stream is read from its
            beginning.
        trains: whether to call ``set_epoch`` of a dataset with a length too; false for evaluations,
            which may use the training dataset.
    """
    for part in (getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)):
        if isinstance(part, (RankBatchSampler, RankStream)):
            if isinstance(part, RankStream):
                part.set_epoch(epoch, start=start, state=source)
            else:
                part.set_epoch(epoch, start=start)
                if trains:
                    _set_dataset_epoch(loader, epoch, sampler=part)
            # Seeds of loader processes depend on the epoch, not on where the run began.
            seed = derived_seed(part.worker_seed, step=epoch, rank=part.topology.rank)
            loader.generator.manual_seed(seed)
            return
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        tell = getattr(part, "set_epoch", None)
        if tell is not None:
            tell(epoch)
            return


def _set_dataset_epoch(loader: Any, epoch: int, *, sampler: RankBatchSampler) -> None:
    """Call ``set_epoch`` of a dataset with a length, as needed for a curriculum.

    The dataset may change its length in this call. Loader processes have copies of the dataset, so
    they are ended and started anew.
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
    """Let a loader's stream keep its states from the next epoch on, for ``source_state``."""
    if isinstance(stream := getattr(loader, "dataset", None), RankStream):
        stream.keeps_states = True


def source_state(loader: Any, samples: int) -> dict[str, Any] | None:
    """Return the state of a loader's stream after ``samples`` samples of the epoch, over all ranks.

    The state is the same for any topology and on any rank, unless each rank has a part of the data.
    None where the dataset is no stream, or its exact position is not known.
    """
    stream = getattr(loader, "dataset", None)
    return stream.state_at(samples) if isinstance(stream, RankStream) else None
