"""Attributes of transformers' Trainer: their values here, or errors that name a replacement."""

from __future__ import annotations

from typing import Any

from dstrain.core.adapters import inner_model
from dstrain.trainer.base import TrainerBase
from dstrain.trainer.overrides import ELSEWHERE

# Attribute or method that makes no sense here -> what to use instead.
INSTEAD = {
    "accelerator": (
        "there is no accelerate here. For a loss of your own override compute_loss and return it: "
        "training_step sends it back through the engine, scaled. Use self.args.process_index, "
        "world_size, device, parallel_mode and main_process_first() for facts of this process, "
        "self.is_world_process_zero(), self.model for the model without wrappers and "
        "self.model_wrapped with them; predictions come gathered to compute_metrics"
    ),
    "gather_function": "predictions come gathered to compute_metrics",
    "current_gradient_accumulation_steps": "use self.resolved.accumulation",
    "push_in_progress": "train() ends once uploads have; push_to_hub(blocking=False) returns one",
    "model_preparation_time": "nothing is prepared by an evaluation; eval_runtime is its time",
    "neftune_hook_handle": "train() adds the noise and takes it away; see args.neftune_noise_alpha",
    "create_accelerator_and_postprocess": "there is no accelerate here, and the engine is built by "
    "train()",
    "end": "use close()",
    "get_batch_samples": "override get_train_dataloader",
    "get_total_train_batch_size": "use self.resolved.global_batch_size",
    "set_initial_training_values": "use self.state.max_steps and num_train_epochs",
    "loss_is_scaled_for_ga": "the loss of a step is the mean over all of its targets, whoever "
    "computes them; see compute_loss",
}


class OtherAttributes(TrainerBase):
    """Answers lookups of attributes that scripts written for transformers' Trainer use."""

    is_deepspeed_enabled = True
    is_fsdp_enabled = False
    is_fsdp_xla_enabled = False
    is_fsdp_xla_v1_enabled = False
    is_fsdp_xla_v2_enabled = False
    is_tp_enabled = False
    is_distributed_loading_by_transformers = False

    @property
    def can_return_loss(self) -> bool:
        """Tell whether the model's ``forward`` returns a loss by default (``return_loss``)."""
        from dstrain.trainer import compat

        return bool(compat.can_return_loss(type(inner_model(self.model))))

    @property
    def neftune_noise_alpha(self) -> float | None:
        """Return the strength of NEFTune's noise, as the arguments say it."""
        alpha: float | None = self.args.neftune_noise_alpha
        return alpha

    @property
    def label_smoother(self) -> Any:
        """Return transformers' ``LabelSmoother`` for an override of ``compute_loss``, or None.

        ``compute_loss`` itself smooths in the same way, over the targets of the model's own loss.
        """
        from dstrain.trainer import compat

        return None if self._smoothing is None else compat.LabelSmoother(self._smoothing.share)

    @label_smoother.setter
    def label_smoother(self, value: object) -> None:
        raise AttributeError(
            "label_smoother follows args.label_smoothing_factor; for a loss of your own override "
            "compute_loss, or pass compute_loss_func"
        )

    def get_sp_size(self) -> int:
        """Return the number of ranks that share a sequence: 1."""
        return 1

    def get_cp_size(self) -> int:
        """Return the number of ranks that share a context: 1."""
        return 1

    def get_tp_size(self) -> int:
        """Return the number of ranks that share a layer: 1."""
        return 1

    def __getattr__(self, name: str) -> Any:
        """Say what to use instead of an attribute that only transformers' Trainer has.

        Raises:
            AttributeError: always: Python calls this only for attributes that do not exist.
        """
        kind = type(self)
        if hasattr(kind, name):
            return object.__getattribute__(self, name)  # the error of the property itself
        instead = INSTEAD.get(name)
        if instead is None and name in ELSEWHERE:
            instead = f"use {ELSEWHERE[name]}"
        what = f"{kind.__name__!r} object has no attribute {name!r}"
        raise AttributeError(what if instead is None else f"{what}: {instead}", name=name, obj=self)
