"""Distinction of training's backward passes from gradients that a loss itself computes.

DeepSpeed 0.19.8 begins its work for a backward pass (of ZeRO, offloading, timers) in hooks on the
outputs of its engine, and takes every pass that reaches them for one of training. Calls of
``autograd.grad`` in a loss (a gradient penalty, adversarial inputs) reach them too. Without this
module, that is an error at stage 0, about a missing call of ``backward``. At the other stages the
gradient is divided by the number of micro-batches, and parameters' gradients are reduced before
they exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dstrain.core.errors import Problem, TrainingError


class TrainingPasses:
    """Begins DeepSpeed's work at the start of each backward pass that trains.

    These are passes in a ``training_pass`` block, and passes outside of one that reach a parameter
    (``tensor.backward()`` in a user's code), for which DeepSpeed works as without this class.

    Attributes:
        has_graph: whether a gradient was computed with ``create_graph`` since the last training
            pass.
    """

    def __init__(self, engine: Any, module: torch.nn.Module) -> None:
        """Replace the functions that the hooks of a ``DeepSpeedEngine`` call.

        Args:
            engine: the ``DeepSpeedEngine``.
            module: the model, whose parameters a pass may reach.
        """
        self._begin, self._share = engine._backward_prologue, engine._backward_prologue_per_tensor
        self._parameters = list(module.parameters())
        self._graph: int | None = None  # the user's pass for which DeepSpeed's work has begun
        self._is_training = self.has_graph = False
        engine._backward_prologue = _leave_it_to_the_tensors
        engine._backward_prologue_per_tensor = self._at_output

    @contextlib.contextmanager
    def training_pass(self, loss: torch.Tensor) -> Iterator[None]:
        """Take the backward pass of ``loss`` inside the block for one of training."""
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
        """Begin DeepSpeed's work, at the first gradient of a training pass."""
        self._begin()

    def _at_output(self, grad: Any) -> Any:
        """Return the gradient of an output, scaled by DeepSpeed if a user's pass trains."""
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
        """Tell whether the running pass adds to the gradient of any parameter.

        The time grows with the number of parameters; only passes outside of training call this.
        """
        for parameter in self._parameters:
            if not parameter.requires_grad:
                continue
            with torch.enable_grad():
                node = torch.autograd.graph._get_grad_fn_or_grad_acc(parameter)
            try:
                if torch._C._will_engine_execute_node(node):
                    return True
            except RuntimeError:  # torch raises it where autograd.grad has this leaf as an input
                return False
        return False


def _leave_it_to_the_tensors() -> None:
    """Do nothing; ``TrainingPasses`` begins DeepSpeed's work in the hook on each output."""


def no_second_gradient() -> TrainingError:
    """Return the error for a loss that needs the gradient of a gradient at stage 3."""
    return TrainingError(
        Problem(
            "the loss asks for the gradient of a gradient (create_graph=True), which ZeRO stage 3 "
            "cannot give",
            "DeepSpeed gathers the weights of a layer for its forward and its backward pass, and "
            "not for the pass through that backward pass",
            "set zero_stage to 2, or approximate the term by differences of two forward passes",
        )
    )
