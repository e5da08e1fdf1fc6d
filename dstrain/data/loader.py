"""Loaders of one rank's micro-batches, from a dataset with a length or from a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.seeds import derived_seed
from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.rebalance import RebalancedBatchSampler
from dstrain.data.streams import Dispatched, RankStream, StreamLoader, share_of
from dstrain.data.worker_seeds import prepare_worker

logger = get_logger(__name__)

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class LoaderOptions:
    """Options of a loader; most are those of ``torch.utils.data.DataLoader``.

    With ``dispatch`` the main rank reads a stream and sends its samples to the other ranks.
    ``rebalance`` is the number of micro-batches per optimizer step among which the samples of a
    step are distributed by length; None gives each micro-batch the same number of samples.
    """

    num_workers: int = 0
    prefetch_factor: int | None = None
    pin_memory: bool = False
    persistent_workers: bool = False
    multiprocessing_context: str | None = None
    drop_last: bool = False
    dispatch: bool = False
    rebalance: int | None = None


def is_stream(dataset: Any) -> bool:
    """Tell whether a dataset has no length and can only be iterated."""
    return isinstance(dataset, IterableDataset) or not (
        isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    )


def build_loader(
    dataset: Any,
    topology: Topology,
    collate: Collator,
    options: LoaderOptions,
    *,
    seed: int,
    shuffle: bool,
    lengths: Sequence[int] | torch.Tensor | None = None,
) -> DataLoader[Any]:
    """Return a loader of this rank's micro-batches, one per micro-step.

    A map-style dataset is read through ``RankBatchSampler``; a stream through ``RankStream`` in the
    stream's own order. ``lengths`` of a map-style dataset serve to group similar samples, or with
    ``options.rebalance`` to distribute the samples of an optimizer step over micro-batches.
    Reads no sample and makes no collective; ``detect_split`` does both before a loader is used.

    Raises:
        DataError: the dataset has no samples, or cannot be dispatched.
    """
    if options.dispatch:
        if not is_stream(dataset):
            raise _cannot_dispatch("a dataset with a length, of which every rank reads its own")
        if share_of(dataset) is not None:
            raise _cannot_dispatch("split_dataset_by_node: the main rank would read its part alone")
        if options.num_workers:
            raise _cannot_dispatch("dataloader_num_workers above 0: ranks must read in step")
        main = topology.rank == 0
        dataset = Dispatched(dataset, is_main=main, block=topology.chunk)
    workers = options.num_workers
    extra: dict[str, Any] = {}
    if workers:
        extra = {
            "prefetch_factor": options.prefetch_factor,
            "persistent_workers": options.persistent_workers,
            "multiprocessing_context": options.multiprocessing_context,
        }
    common: dict[str, Any] = {
        "pin_memory": options.pin_memory,
        "worker_init_fn": prepare_worker,
        **extra,
    }
    # Seeds of loader processes: different on each rank, and not from the global random state.
    noise = derived_seed(seed, step=0, rank=topology.rank)
    common["generator"] = torch.Generator().manual_seed(noise)
    if is_stream(dataset):
        if workers > (limit := _worker_limit(dataset, workers)):
            logger.warning(
                "%s gives its samples in order to %d loader process only: using %d instead of %d",
                type(dataset).__name__,
                limit,
                limit,
                workers,
            )
            workers = limit
        stream = RankStream(dataset, topology, collate, drop_last=options.drop_last)
        stream.worker_seed = seed
        if workers and options.persistent_workers:
            stream.share_position()
        return StreamLoader(
            stream, batch_size=None, collate_fn=_as_it_is, num_workers=workers, **common
        )
    if len(dataset) == 0:
        raise DataError(Problem("the dataset is empty", "at least one sample is needed"))
    sampler = _sampler(len(dataset), topology, options, seed=seed, shuffle=shuffle, lengths=lengths)
    sampler.worker_seed = seed
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        **common,
    )


def _sampler(
    num_samples: int,
    topology: Topology,
    options: LoaderOptions,
    *,
    seed: int,
    shuffle: bool,
    lengths: Sequence[int] | torch.Tensor | None,
) -> RankBatchSampler:
    """Return the sampler that yields this rank's sample indices for each micro-step."""
    if options.rebalance is None or lengths is None:
        order = EpochOrder(num_samples, seed=seed, shuffle=shuffle, lengths=lengths)
        return RankBatchSampler(order, topology, drop_last=options.drop_last)
    return RebalancedBatchSampler(
        EpochOrder(num_samples, seed=seed, shuffle=shuffle),
        topology,
        lengths=torch.as_tensor(lengths),
        accumulation=options.rebalance,
        drop_last=options.drop_last,
    )


def _cannot_dispatch(what: str) -> DataError:
    return DataError(
        Problem(
            f"dispatch_batches=True with {what}",
            "",
            "leave dispatch_batches out, or change the other setting",
        )
    )


def is_dstrain_loader(loader: Any) -> bool:
    """Tell whether ``build_loader`` made the loader, so that it gives each rank its share."""
    return isinstance(getattr(loader, "batch_sampler", None), RankBatchSampler) or isinstance(
        getattr(loader, "dataset", None), RankStream
    )


def end_processes(loader: Any) -> None:
    """End the processes that ``loader`` keeps between its iterations, if any.

    Python's cycle collector would end them too late: the queue that tells them to end would be gone
    by then, and torch would wait five seconds for each process in vain.
    """
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator = None  # the only reference, so that it ends here


def _as_it_is(batch: Any) -> Any:
    """Return the batch unchanged, where torch would make lists of tuples and tensors of arrays."""
    return batch


def _worker_limit(dataset: Any, wanted: int) -> int:
    """Return the number of loader processes with which a stream keeps its order, at most."""
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return 1
    return int(getattr(dataset, "max_workers", wanted))
