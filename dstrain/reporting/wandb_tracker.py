"""W&B with this trainer's models: transformers' own callback saves them with its own Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstrain.reporting import compat

_ASIDE = ".wandb-model"


_Base: Any = compat.INTEGRATION_TO_CALLBACK["wandb"]


class WandbCallback(_Base):
    """Reports to W&B; uploads the final model where WANDB_LOG_MODEL asks for it.

    Attributes:
        save_model: writes the model into a folder; a collective of all ranks.
    """

    save_model: Callable[[str], None] | None = None

    @property
    def reads_checkpoints(self) -> bool:
        """Tell whether the callback uploads each checkpoint once it is saved."""
        return getattr(self._log_model, "value", "") == "checkpoint"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a W&B run, unless this is a trial of a sweep, which has begun one already."""
        run = self._wandb.run
        if state.is_hyper_param_search and run is not None and run.sweep_id:
            self.setup(args, state, kwargs.pop("model", None), **kwargs)
        else:
            super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upload the model as all ranks write it, whole at every ZeRO stage."""
        if not (self._log_model.is_enabled and self._initialized) or self.save_model is None:
            return
        folder = Path(args.output_dir) / _ASIDE
        self.save_model(str(folder))
        if not state.is_world_process_zero:
            return
        run = self._wandb.run
        named = args.run_name not in (None, args.output_dir)
        numbers = {k: v for k, v in dict(self._wandb.summary).items() if _is_figure(k, v)}
        if args.load_best_model_at_end:
            numbers = {f"eval/{args.metric_for_best_model}": state.best_metric}
        artifact = self._wandb.Artifact(
            name=f"model-{run.name if named else run.id}",
            type="model",
            metadata={**numbers, "final_model": True},
        )
        artifact.add_dir(str(folder), policy="mutable")  # copied, as the folder goes
        run.log_artifact(artifact, aliases=["final_model"])
        shutil.rmtree(folder, ignore_errors=True)


def _is_figure(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not name.startswith("_")
