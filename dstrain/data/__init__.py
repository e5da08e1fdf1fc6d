"""Sample order, per-rank loaders, accumulation windows, columns."""

from dstrain.data.columns import forward_columns, keep_columns, label_columns
from dstrain.data.loader import (
    AheadHooks,
    Collator,
    LoaderOptions,
    MicroBatch,
    Window,
    build_loader,
    fetches_ahead,
    is_ours,
    is_stream,
    iterate,
    micro_steps,
    set_epoch,
    windows,
)
from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.targets import Targets, batch_size, input_tokens, to_device

__all__ = [
    "AheadHooks",
    "Collator",
    "EpochOrder",
    "LoaderOptions",
    "MicroBatch",
    "RankBatchSampler",
    "Targets",
    "Topology",
    "Window",
    "batch_size",
    "build_loader",
    "fetches_ahead",
    "forward_columns",
    "input_tokens",
    "is_ours",
    "is_stream",
    "iterate",
    "keep_columns",
    "label_columns",
    "micro_steps",
    "set_epoch",
    "to_device",
    "windows",
]
