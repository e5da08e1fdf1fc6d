"""Sample order, per-rank loaders, accumulation windows, columns."""

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
from dstrain.data.loss_rule import IGNORED, Denominator, LossFindings, LossRule
from dstrain.data.loss_targets import LossTargets, no_targets
from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.resumable import Resumable
from dstrain.data.samples import batch_size
from dstrain.data.settle import inherit_findings, num_shares, settle
from dstrain.data.targets import TokenCount, empty_columns, input_tokens, to_device
from dstrain.data.together import in_step

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
    "empty_columns",
    "end_processes",
    "fetches_ahead",
    "forward_columns",
    "in_step",
    "inherit_findings",
    "input_tokens",
    "is_ours",
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
    "settle",
    "source_state",
    "takes_target_count",
    "to_device",
    "windows",
]
