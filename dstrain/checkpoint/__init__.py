"""Checkpoints of a run: format, commit, rotation, resume at any topology. See FORMAT.md."""

from dstrain.checkpoint.codec import is_plain
from dstrain.checkpoint.conversion import Converted, convert
from dstrain.checkpoint.difference import Comparison, compare
from dstrain.checkpoint.export import export
from dstrain.checkpoint.find import (
    check_resumable,
    choose_checkpoint,
    verify,
    verify_on_ranks,
    wanted_checkpoint,
)
from dstrain.checkpoint.folders import Found, checkpoint_path, committed, holding, named, step_of
from dstrain.checkpoint.importing import Imported, import_checkpoint
from dstrain.checkpoint.load import Restored, load_into
from dstrain.checkpoint.manifest import Manifest, extra_files, read_manifest
from dstrain.checkpoint.native import Reader, check_readable
from dstrain.checkpoint.policy import Policy, RunRecord
from dstrain.checkpoint.prune import Pruning, best_of, prune
from dstrain.checkpoint.run_files import read_rank_state, read_run
from dstrain.checkpoint.run_lock import RunLock, held_lock
from dstrain.checkpoint.save import CheckpointWriter
from dstrain.checkpoint.trainer_state import (
    TrainerStateRecord,
    read_arguments,
    read_trainer_state,
)
from dstrain.checkpoint.weights import load_weights

__all__ = [
    "CheckpointWriter",
    "Comparison",
    "Converted",
    "Found",
    "Imported",
    "Manifest",
    "Policy",
    "Pruning",
    "Reader",
    "Restored",
    "RunLock",
    "RunRecord",
    "TrainerStateRecord",
    "best_of",
    "import_checkpoint",
    "check_readable",
    "check_resumable",
    "verify_on_ranks",
    "choose_checkpoint",
    "committed",
    "compare",
    "convert",
    "export",
    "extra_files",
    "holding",
    "is_plain",
    "held_lock",
    "load_into",
    "load_weights",
    "named",
    "checkpoint_path",
    "prune",
    "read_arguments",
    "read_manifest",
    "read_rank_state",
    "read_run",
    "read_trainer_state",
    "step_of",
    "verify",
    "wanted_checkpoint",
]
