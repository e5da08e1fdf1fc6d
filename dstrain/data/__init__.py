"""Sample order, per-rank loaders, accumulation windows, columns."""

from dstrain.data.columns import (
    forward_columns,
    keep_columns,
    label_columns,
    returns_loss,
)
from dstrain.data.formats import InputFormats
from dstrain.data.lengths import sample_lengths
from dstrain.data.loader import (
    AheadHooks,
    Collator,
    LoaderOptions,
    MicroBatch,
    Window,
    build_loader,
    end_processes,
    fetches_ahead,
    is_ours,
    is_stream,
    iterate,
    keep_source_states,
    micro_steps,
    num_samples,
    set_epoch,
    source_state,
    windows,
)
from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.resumable import Resumable
from dstrain.data.samples import batch_size
from dstrain.data.targets import IGNORED, Targets, TokenCount, input_tokens, to_device
from dstrain.data.together import in_step

__all__ = [
    "AheadHooks",
    "Collator",
    "EpochOrder",
    "IGNORED",
    "InputFormats",
    "LoaderOptions",
    "MicroBatch",
    "RankBatchSampler",
    "Resumable",
    "Targets",
    "TokenCount",
    "Topology",
    "Window",
    "batch_size",
    "build_loader",
    "end_processes",
    "fetches_ahead",
    "forward_columns",
    "in_step",
    "input_tokens",
    "is_ours",
    "is_stream",
    "iterate",
    "keep_columns",
    "keep_source_states",
    "label_columns",
    "micro_steps",
    "num_samples",
    "returns_loss",
    "sample_lengths",
    "set_epoch",
    "source_state",
    "to_device",
    "windows",
]
