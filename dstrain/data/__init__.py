"""Training and evaluation data: sample order, each rank's loader, accumulation windows, columns."""

from dstrain.data.batches import TokenCount, empty_columns, input_tokens, to_device
from dstrain.data.columns import (
    forward_columns,
    keep_columns,
    label_columns,
    needs_target_count,
    returns_loss,
    takes_target_count,
)
from dstrain.data.formats import InputFormats
from dstrain.data.lengths import sample_lengths
from dstrain.data.loader import (
    Collator,
    LoaderOptions,
    build_loader,
    end_processes,
    is_dstrain_loader,
    is_stream,
)
from dstrain.data.loader_position import (
    keep_source_states,
    micro_steps,
    num_samples,
    set_epoch,
    source_state,
)
from dstrain.data.loss import (
    IGNORED,
    Denominator,
    LossFindings,
    LossRule,
    LossTargets,
    no_targets,
)
from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.samples import batch_size
from dstrain.data.split_detection import detect_split, inherit_split, num_shares
from dstrain.data.streams import Resumable
from dstrain.data.synchronized import synchronized_batches
from dstrain.data.windows import (
    AheadHooks,
    MicroBatch,
    Window,
    fetches_ahead,
    iterate,
    windows,
)

__all__ = [
    "AheadHooks",
    "Collator",
    "Denominator",
    "EpochOrder",
    "IGNORED",
    "InputFormats",
    "LoaderOptions",
    "LossFindings",
    "LossRule",
    "LossTargets",
    "MicroBatch",
    "RankBatchSampler",
    "Resumable",
    "TokenCount",
    "Topology",
    "Window",
    "batch_size",
    "build_loader",
    "detect_split",
    "empty_columns",
    "end_processes",
    "fetches_ahead",
    "forward_columns",
    "inherit_split",
    "input_tokens",
    "is_dstrain_loader",
    "is_stream",
    "iterate",
    "keep_columns",
    "keep_source_states",
    "label_columns",
    "micro_steps",
    "needs_target_count",
    "no_targets",
    "num_samples",
    "num_shares",
    "returns_loss",
    "sample_lengths",
    "set_epoch",
    "source_state",
    "synchronized_batches",
    "takes_target_count",
    "to_device",
    "windows",
]
