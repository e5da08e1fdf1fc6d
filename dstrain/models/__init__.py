"""Building, loading and saving of models, whole or partitioned."""

from dstrain.models.adapters import merge_adapters, without_adapters
from dstrain.models.build import (
    DTYPES,
    build_causal_lm,
    build_seq2seq,
    load_causal_lm,
    load_seq2seq,
    max_length,
    parse_model_config,
)
from dstrain.models.folder import check_model_folder, library_errors
from dstrain.models.guard import guard_partitioned, release_guard
from dstrain.models.host_copies import HostCopies
from dstrain.models.layout import (
    Entry,
    Group,
    computed_of_parts,
    groups_of,
    remark_on,
    unsaved_remark,
    weights_hooks_compute_with,
    weights_not_in_files,
)
from dstrain.models.layout_record import RecordedLayout, record_layout, recorded_layout
from dstrain.models.partitioned import building_partitioned
from dstrain.models.save import check_writable, save_configs, save_model
from dstrain.models.shards import Portion
from dstrain.models.sizes import count_causal_lm, count_seq2seq, sizes_of_module
from dstrain.models.skeleton import Skeleton, skeleton_of
from dstrain.models.tensor_file import Stored, TensorReader, write_tensor_file
from dstrain.models.weight_snapshot import WeightSnapshot, snapshot_bytes, snapshot_weights

__all__ = [
    "DTYPES",
    "Entry",
    "Group",
    "WeightSnapshot",
    "HostCopies",
    "Portion",
    "RecordedLayout",
    "Skeleton",
    "Stored",
    "TensorReader",
    "build_causal_lm",
    "building_partitioned",
    "build_seq2seq",
    "check_model_folder",
    "check_writable",
    "computed_of_parts",
    "count_causal_lm",
    "count_seq2seq",
    "groups_of",
    "guard_partitioned",
    "snapshot_bytes",
    "snapshot_weights",
    "load_causal_lm",
    "load_seq2seq",
    "max_length",
    "merge_adapters",
    "parse_model_config",
    "record_layout",
    "recorded_layout",
    "release_guard",
    "remark_on",
    "save_configs",
    "save_model",
    "sizes_of_module",
    "skeleton_of",
    "library_errors",
    "without_adapters",
    "unsaved_remark",
    "weights_hooks_compute_with",
    "weights_not_in_files",
    "write_tensor_file",
]
