"""Methods of a ``Trainer`` that look at its model, and put another in its place."""

from __future__ import annotations

import contextlib

import torch

from dstrain.core.adapters import inner_model
from dstrain.core.log import get_logger
from dstrain.data import InputFormats, takes_target_count
from dstrain.models import guard_partitioned, merge_adapters, without_adapters
from dstrain.trainer import build
from dstrain.trainer.engine_hooks import EngineHooks
from dstrain.trainer.generation_config import changing, check_generation_config
from dstrain.trainer.model_init import check_on_one_device, fresh_model, num_arguments
from dstrain.trainer.processing import align_special_tokens
from dstrain.trainer.step_hooks import StepHooks
from dstrain.training.label_smoothing import LabelSmoothing
from dstrain.training.loss_terms import LossTerms
from dstrain.training.packed_sequences import flattened, mixes_sequences
from dstrain.training.types import Trial

logger = get_logger(__name__)


class ModelHooks(StepHooks, EngineHooks):
    """Has the methods of a trainer about its model."""

    def call_model_init(self, trial: Trial = None) -> torch.nn.Module | None:
        """Make a new model by ``model_init``, which may take the trial of a search."""
        assert self.model_init is not None
        return self.model_init(trial) if num_arguments(self.model_init) else self.model_init()

    def merge_and_unload(self) -> torch.nn.Module:
        """Merge a PEFT model's active adapters into its weights; all ranks must call it.

        ``peft``'s method of this name cannot work on a partitioned model. The trainer goes on with
        the plain model that is returned: ``save_model`` then writes all of it, at
        every stage, and ``evaluate`` evaluates it. A rank holds one layer whole at a time.

        Raises:
            ModelError: the trainer's model has no adapter that could be merged.
        """
        model = self.model
        merge_adapters(model)  # while there is an engine: it may hold what is offloaded
        self._release_model()
        self._take_model(without_adapters(model))
        return self.model

    # --- behind the edge --------------------------------------------------------------------------

    def _fresh_model(self, trial: object) -> torch.nn.Module:
        return fresh_model(self.call_model_init, self.args, trial)

    def _renew_model(self, trial: object) -> None:
        """Replace the model by a new one, after the old one and all that holds its parameters."""
        self._release_model()
        self._take_model(self._fresh_model(trial))

    def _release_model(self) -> None:
        """Let go of the model, so that nothing holds it when the next one takes memory."""
        self.close()
        self.model = None  # type: ignore[assignment]
        self._counted = None
        self._forget_optimizer()
        self._show_objects(None)

    def _take_model(self, model: torch.nn.Module) -> None:
        """Go on with a model, after ``_release_model``."""
        self.model = model
        self._show_objects(None)
        self._note_model()

    def _note_model(self) -> None:
        """Derive from the model its loss rule, input formats and what its forward pass takes."""
        check_on_one_device(self.model)
        guard_partitioned(self.model, patience_seconds=self.args.ddp_timeout)
        self._check_generation_config()
        self.model_accepts_loss_kwargs = takes_target_count(self.model)
        self._smoothing = LabelSmoothing.of(self.model, self.args)
        self._terms = None
        model_loss = self.compute_loss_func is None and not self._overrides("compute_loss")
        if model_loss and self._smoothing is None:
            self._terms = LossTerms.of(self.model)
        self.targets = build.targets_of(
            self.model,
            self.args,
            rule=None if self._terms is None else self._terms.rule(),
            model_loss=model_loss,
            receives_count=self.compute_loss_func is not None or self.model_accepts_loss_kwargs,
        )
        self._formats = InputFormats(self.model, self.targets.labels)

    def _check_generation_config(self) -> None:
        if getattr(self.args, "generation_config", None) is None:  # which takes its place
            check_generation_config(self.model)

    def _align_special_tokens(self) -> None:
        """Give the model its tokenizer's special tokens, at which generation then stops."""
        generation = getattr(self.model, "generation_config", None)
        with contextlib.nullcontext() if generation is None else changing(generation):
            changed = align_special_tokens(self.model, self.processing_class)
        if changed and self.ranks.is_main:
            logger.warning(
                "the model's special tokens were not those of the tokenizer; now they are, and are "
                "saved so: %s",
                ", ".join(f"{name}={token}" for name, token in changed.items()),
            )

    def _warn_of_mixing(self, model: torch.nn.Module) -> None:
        """Warn where padding-free batches go to a model that cannot keep sequences apart.

        Args:
            model: the engine or module that runs the forward pass.
        """
        batch_of = flattened(self.data_collator)
        if batch_of is None:
            return
        mixes = mixes_sequences(model, self.model, batch_of, self._prepare_inputs)
        if mixes and self.ranks.is_main:
            logger.warning(
                "%s lets the sequences that %s puts into one row see each other: it does not heed "
                "their position_ids. To train on each alone, use a collator that pads",
                type(inner_model(self.model)).__name__,
                type(self.data_collator).__name__,
            )
