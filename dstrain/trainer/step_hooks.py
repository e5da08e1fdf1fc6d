"""Methods of a ``Trainer`` that compute the loss and gradients of one micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dstrain.core.errors import ModelError, Problem, TrainingError
from dstrain.core.log import get_logger
from dstrain.data import needs_target_count
from dstrain.engine import device_name
from dstrain.models import DTYPES
from dstrain.trainer.base import TrainerBase
from dstrain.training.accumulation import MicroStep
from dstrain.training.model_outputs import check_loss, loss_of
from dstrain.training.types import Batch, Nested

logger = get_logger(__name__)


class StepHooks(TrainerBase):
    """Has the methods of transformers' Trainer about one micro-batch."""

    _micro_step: MicroStep | None = None  # that the loop is training, while it does
    _parts: torch.Tensor | None = None  # of the loss of that micro-batch, where it has several
    _summed: tuple[torch.Tensor, torch.Tensor] | None = None  # a loss, and the terms of its sum
    _eval_format: str | None = None  # of the evaluation that is running, where it has its own

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the mean loss over the targets of one micro-batch.

        The loop weights it by its number of targets, so the optimised loss is the mean over all
        targets of the global batch. An override (or ``compute_loss_func``) may use
        ``num_items_in_batch``, the targets of *this* micro-batch: dividing a summed loss by it
        gives the same mean. It is passed on to a model whose ``forward`` names it, unless
        ``model_accepts_loss_kwargs`` is set to false.

        Returns:
            the loss, or (loss, outputs).

        Raises:
            ModelError: the model returned no loss.
        """
        if self.compute_loss_func is not None:
            loss, outputs = self._loss_of_function(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self._smoothing is not None:
            smoothed, outputs = self._smoothing(model, self.model, inputs, self.targets)
            return (smoothed, outputs) if return_outputs else smoothed
        if self._terms is not None and self._terms.apply_to(inputs):
            terms, outputs = self._terms(model, inputs)
            summed = terms.sum()
            self._summed = summed, terms
            return (summed, outputs) if return_outputs else summed
        if isinstance(inputs, Mapping):
            passed = dict(inputs)
            # What it averages over by itself tells what to count; so it is not told at first.
            knows = self.targets.settled or needs_target_count(self.model)
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None and knows:
                passed["num_items_in_batch"] = num_items_in_batch
            outputs = model(**passed)
        else:
            outputs = model(inputs)
        found = loss_of(outputs)
        if found is None:
            given = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            returned = f", only {list(outputs)}" if isinstance(outputs, Mapping) else ""
            raise ModelError(
                Problem(
                    f"{type(self.model).__name__} returned no loss{returned}",
                    f"it was given {given}",
                    "add labels to the batch, pass compute_loss_func, or override compute_loss",
                )
            )
        return (found, outputs) if return_outputs else found

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch; return its mean loss, detached.

        Raises:
            TrainingError: called outside of ``train()``.
        """
        engine = self._engines.training
        if engine is None or not self.is_in_train:
            raise TrainingError(
                Problem(
                    "training_step() outside of train()",
                    "the engine that takes gradients is built by train(), which also decides "
                    "which micro-batches make an optimizer step",
                    "call train(); for a loss alone call compute_loss(trainer.model, inputs)",
                )
            )
        step = MicroStep(inputs) if self._micro_step is None else self._micro_step
        inputs = self._prepare_inputs(inputs)
        with (
            self._computing_loss(inputs),
            self.compute_loss_context_manager(),
            self._watching_loss(step, inputs) as seen,
            engine.computing_loss(),
        ):
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            check_loss(loss, self.compute_loss_func or type(self).compute_loss)
            seen.append(loss)
        # In fp32: a 16-bit loss times the loss scale would overflow before its gradients do.
        parts = self._parts_of(loss).float()
        self._parts = parts.detach() if parts.dim() else None
        engine.backward(step.weighted(parts).sum(), last=step.is_last)
        return loss.detach()

    def train_micro_batch(
        self, micro_step: MicroStep, num_targets: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Call ``training_step`` for the loop; return the mean loss, or its parts.

        What ``training_step`` needs beyond its arguments is kept beside it while it runs: an
        override of a user's stands between.

        Args:
            micro_step: the micro-batch, and its place in the optimizer step.
            num_targets: that its loss is a mean over, where user code is told.
        """
        engine = self._engines.training
        assert engine is not None
        self._micro_step, self._parts = micro_step, None
        try:
            loss = self.training_step(engine.model, micro_step.inputs, num_targets)
        finally:
            self._micro_step = None
        return loss if self._parts is None else self._parts

    def _watching_loss(
        self, step: MicroStep, given: object
    ) -> contextlib.AbstractContextManager[list[Any]]:
        """Watch the first forward pass of a step for what its loss is a mean over."""
        if step.index:
            return contextlib.nullcontext([])
        return self.targets.watching(
            step.inputs, step.num_samples, given=given, again=step.looks_again
        )

    def _parts_of(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the terms of a loss that ``compute_loss`` has just computed, or the loss itself.

        A loss that an override has changed is none of theirs, and is shared out among the parts.
        """
        summed, self._summed = self._summed, None
        if summed is not None and summed[0] is loss:
            return summed[1]
        num_parts = len(self.targets.rule.parts)
        return loss if num_parts == 1 else (loss / num_parts).expand(num_parts)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[object]:
        """Return the context to compute the loss in: that of ``autocast_smart_context_manager``."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.autocast_smart_context_manager())
        return stack

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[object]:
        """Return an autocast context where no engine, which would autocast itself, runs the model.

        Args:
            cache_enabled: for drop-in use.
        """
        return self._engines.autocast(self.model, self.resolved)

    def _loss_of_function(
        self, model: Callable[..., object], inputs: object, num_items: object
    ) -> tuple[torch.Tensor, Nested]:
        """Compute the user function's loss of outputs and labels; the model gets no labels.

        Without a count (in evaluation) the function is told the batch's own, so that a sum divided
        by it is a mean there too.
        """
        assert self.compute_loss_func is not None
        labels = None
        given = inputs
        if isinstance(inputs, Mapping):
            given = {name: value for name, value in inputs.items() if name != "labels"}
            labels = inputs.get("labels")
        if num_items is None:
            num_items = self.targets.target_count(inputs)
        outputs = model(**given) if isinstance(given, Mapping) else model(given)
        loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items)
        return loss, outputs

    @property
    def _format(self) -> str:
        """Return the number format of what goes into the model."""
        return self._eval_format or self._engines.precision(self.model, self.resolved)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return self._formats(inputs, device_name(), DTYPES[self._format])

    def _computing_loss(self, inputs: object) -> contextlib.AbstractContextManager[None]:
        return self._formats.computing_loss(inputs, DTYPES[self._format])
