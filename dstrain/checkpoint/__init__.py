"""Checkpoints of a run: format, commit, rotation, resume at any topology. See FORMAT.md."""

from dstrain.checkpoint.export import export
from dstrain.checkpoint.find import AUTO, check_there, choose, verify, wanted_checkpoint
from dstrain.checkpoint.folders import Found, committed, holding
from dstrain.checkpoint.load import Restored, load_into, read_run
from dstrain.checkpoint.manifest import Manifest, read_manifest
from dstrain.checkpoint.save import CheckpointWriter, Policy, RunRecord

__all__ = [
    "AUTO",
    "CheckpointWriter",
    "Found",
    "Manifest",
    "Policy",
    "Restored",
    "RunRecord",
    "check_there",
    "choose",
    "committed",
    "export",
    "holding",
    "load_into",
    "read_manifest",
    "read_run",
    "verify",
    "wanted_checkpoint",
]
