"""Backward passes of training, distinguished from gradients that a loss computes for itself.

DeepSpeed 0.19.8 begins its work for a backward pass (of ZeRO, offloading, timers) in hooks on the
outputs of its engine, and takes every pass that reaches them for one of training. A pass of
``autograd.grad`` in a loss (a gradient penalty, adversarial inputs) reaches them too. At stage 0
that raised an error, though nobody called ``backward``. At the other stages the result was divided
by the number of micro-batches, and gradients were reduced that did not exist yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dstrain.core.errors import Problem, TrainingError


class TrainingPasses:
    """Begins DeepSpeed's work at the start of each pass that trains, and at no other time.

    A pass outside of ``training_pass`` that reaches a parameter (``tensor.backward()`` in a user's
    code) is left to DeepSpeed, as before.

    Attributes:
        has_graph: whether a gradient was asked for, since the last pass that trained, in a way that
            lets it be differentiated (``create_graph``).
    """

    def __init__(self, engine: Any, module: torch.nn.Module) -> None:
        """Replace the functions that the hooks of a ``DeepSpeedEngine`` call.

        Args:
            engine: DeepSpeed's.
            module: the model, whose parameters a pass may reach.
        """
        self._begin, self._share = engine._backward_prologue, engine._backward_prologue_per_tensor
        self._parameters = list(module.parameters())
        self._graph: int | None = None  # the user's pass that DeepSpeed knows of
        self._is_training = self.has_graph = False
        engine._backward_prologue = _leave_it_to_the_tensors
        engine._backward_prologue_per_tensor = self._at_output

    @contextlib.contextmanager
    def training_pass(self, loss: torch.Tensor) -> Iterator[None]:
        """Run the pass of ``loss`` inside; it begins when the gradient of ``loss`` is computed."""
        if not loss.requires_grad:  # DeepSpeed raises an error
            yield
            return
        handle = loss.register_hook(self._at_loss)
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = self.has_graph = False
            handle.remove()

    def _at_loss(self, _: torch.Tensor) -> None:
        self._begin()

    def _at_output(self, grad: Any) -> Any:
        """Return the gradient of an output, as DeepSpeed wants it in this pass."""
        from deepspeed.utils.torch import is_functorch_transforming

        if self._is_training or is_functorch_transforming():
            return grad
        self.has_graph |= torch.is_grad_enabled()
        if not self._reaches_parameters():
            return grad
        graph = torch._C._current_graph_task_id()
        if graph != self._graph:
            self._graph = graph
            self._begin()
        return self._share(grad)

    def _reaches_parameters(self) -> bool:
        """Tell whether the pass that runs adds to the gradient of a parameter.

        Checks parameters until one is found; only in passes that do not train.
        """
        for parameter in self._parameters:
            if not parameter.requires_grad:
                continue
            with torch.enable_grad():
                node = torch.autograd.graph._get_grad_fn_or_grad_acc(parameter)
            try:
                if torch._C._will_engine_execute_node(node):
                    return True
            except RuntimeError:  # of torch, for a leaf that autograd.grad was asked about
                return False
        return False


def _leave_it_to_the_tensors() -> None:
    """Do nothing at the first output: the hooks on each output follow, and know the pass."""


def no_second_gradient() -> TrainingError:
    """Return the error for a loss that contains the gradient of a gradient, at stage 3."""
    return TrainingError(
        Problem(
            "the loss asks for the gradient of a gradient (create_graph=True), which ZeRO stage 3 "
            "cannot give",
            "DeepSpeed gathers the weights of a layer for its forward and its backward pass, and "
            "not for the pass through that backward pass",
            "set zero_stage to 2, or approximate the term by differences of two forward passes",
        )
    )
