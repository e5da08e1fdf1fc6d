"""Showing a run: progress, trackers, curves; the bridge to transformers' callbacks."""

from dstrain.reporting.curve import save_loss_curve
from dstrain.reporting.trackers import (
    progress_callback,
    set_tensorboard_folder,
    tracker_callbacks,
)

__all__ = ["save_loss_curve", "progress_callback", "set_tensorboard_folder", "tracker_callbacks"]
