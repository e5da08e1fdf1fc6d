"""Resolving the config of a ``Trainer``, and building and closing its engine."""

from __future__ import annotations

from typing import Any

from dstrain.config import ResolvedConfig
from dstrain.engine import Engine
from dstrain.trainer import build
from dstrain.trainer.engines import make_ordinary
from dstrain.trainer.loader_hooks import LoaderHooks
from dstrain.trainer.optimizer_hooks import OptimizerHooks


class EngineHooks(OptimizerHooks, LoaderHooks):
    """Has the methods of a trainer about its DeepSpeed engine."""

    @property
    def model_wrapped(self) -> Any:
        """Return the DeepSpeed engine while it is on the model, else the model."""
        engine = self._engines.training
        return self.model if engine is None or engine.is_released else engine.model

    @property
    def deepspeed(self) -> Any:
        """Return the DeepSpeed engine of the training that runs or ran last, or None."""
        engine = self._engines.training
        return None if engine is None else engine.model

    def close(self, *, whole: bool | str = False) -> None:
        """Tear down the engine and free its memory; the model keeps its weights.

        ``train`` and ``evaluate`` work afterwards, with a new engine. An optimizer of the user's
        own has the model's parameters again, without state. At ZeRO stage 3 the model stays
        partitioned, which ordinary torch code cannot use.

        Args:
            whole: at stage 3 put the weights together, on every rank and its device, or on the
                device of this name, such as "cpu"; all ranks must call it then. They must fit.
        """
        self.optimizer, self.lr_scheduler = self._user.optimizer, self._user.scheduler
        self._show_objects(None)
        self._engines.close()
        self._user.restore_parameters()
        self._release_eval_loaders()
        if whole:
            make_ordinary(self.model, whole if isinstance(whole, str) else None)

    def propagate_args_to_deepspeed(self, auto_find_batch_size: bool = False) -> None:
        """Resolve the DeepSpeed config again, after a change of ``args``; training does so itself.

        Args:
            auto_find_batch_size: for drop-in use.
        """
        self.resolved = self._resolve(None)

    # --- behind the edge --------------------------------------------------------------------------

    def _resolve(self, max_steps: int | None) -> ResolvedConfig:
        """Resolve the config of the present arguments, model and optimizer; alike on all ranks.

        Args:
            max_steps: optimizer steps of the run, where they are known.
        """
        return build.resolve_config(
            self.args,
            self.ranks,
            found_batch=self.fitted,
            module=self.model,
            sequence_length=self.sequence_length,
            num_training_steps=max_steps,
            user_optimizer=self._has_user_optimizer,
            user_scheduler=self._has_user_scheduler,
        )

    def _start_engine(self, max_steps: int) -> Engine:
        """Build the engine of a training, in the place of one that is there."""
        engine = self._engines.train(lambda: self._build_engine(max_steps))
        self.optimizer, self.lr_scheduler = engine.optimizer, engine.scheduler
        return engine

    def _build_engine(self, max_steps: int) -> Engine:
        optimizer, scheduler = self._optimizer_for_run(max_steps)
        return build.training_engine(
            self.model,
            self.resolved,
            optimizer=optimizer,
            scheduler=scheduler,
            decay_names=self.get_decay_parameter_names,
        )
