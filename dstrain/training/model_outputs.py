"""Finding the loss and the predictions in the outputs of a model's forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dstrain.core.errors import Problem, TrainingError
from dstrain.training.types import Nested


def loss_of(outputs: object, *, only_scalar: bool = False) -> torch.Tensor | None:
    """Return the loss in a model's outputs: their "loss", or the first of a tuple.

    Args:
        outputs: of a forward pass.
        only_scalar: where there may be no loss, only a tensor without dimensions is taken for one.
    """
    if isinstance(outputs, torch.Tensor):
        loss: Any = outputs
    elif isinstance(outputs, Mapping):
        return outputs.get("loss")
    else:
        named = getattr(outputs, "loss", None)
        if named is not None:
            return named
        loss = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    if only_scalar and not (isinstance(loss, torch.Tensor) and loss.dim() == 0):
        return None
    return loss


def check_loss(loss: object, function: Callable[..., object]) -> None:
    """Refuse what cannot be trained on; nothing waits for the device.

    Args:
        loss: what is to be trained on.
        function: what returned it: a ``compute_loss``, or a user's ``compute_loss_func``.

    Raises:
        TrainingError: it is no tensor, or has no gradient.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    where = f"{function.__module__}.{name} returned"
    if not isinstance(loss, torch.Tensor):
        kind = type(loss).__name__
        raise TrainingError(
            Problem(
                f"{where} {'nothing' if loss is None else f'a {kind}'}",
                "in training a loss alone is expected, as a tensor",
                "return the loss alone; a compute_loss returns (loss, outputs) where it is called "
                "with return_outputs=True, as in evaluations"
                if isinstance(loss, (tuple, list, Mapping))
                else "return the tensor that the loss was computed as: no None, and no .item()",
            )
        )
    if not loss.requires_grad:
        raise TrainingError(
            Problem(
                f"{where} a loss without a gradient",
                "no parameter that is trained has gone into it, or it was detached",
                "compute it from the model's outputs, outside of torch.no_grad() and without "
                "detach(); see that some parameters have requires_grad",
            )
        )


def logits_of(outputs: object, ignore_keys: Sequence[str], *, has_loss: bool) -> Nested:
    """Return all outputs but the loss and those ignored; a single one without a tuple.

    Args:
        outputs: of a forward pass.
        ignore_keys: names of outputs to leave out.
        has_loss: whether there is a loss, which the first of a tuple then is if it is a scalar.
    """
    if isinstance(outputs, Mapping):
        left_out = {"loss", *ignore_keys}
        parts = tuple(v for k, v in outputs.items() if k not in left_out and v is not None)
    elif isinstance(outputs, torch.Tensor):
        parts = () if has_loss and outputs.dim() == 0 else (outputs,)
    elif isinstance(outputs, (tuple, list)):
        # A loss of the user's own is none of the model's outputs.
        first = outputs[0] if outputs else None
        drop = has_loss and isinstance(first, torch.Tensor) and first.dim() == 0
        parts = tuple(outputs[1:] if drop else outputs)
    else:
        logits = getattr(outputs, "logits", None)
        parts = () if logits is None else (logits,)
    if len(parts) == 1:
        return parts[0]
    return parts or None
