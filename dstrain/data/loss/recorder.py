"""Recording of calls of torch's loss functions in a forward pass, and of uses of their results.

A class name tells little about a loss: subclasses, wrappers and users' losses have any name, and
several models of transformers compute another loss than their name suggests. The calls of torch's
loss functions are reliable, so the first forward passes of a run are watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CLASSES = (functional.cross_entropy, functional.nll_loss)
ELEMENTWISE = (
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.huber_loss,
    functional.l1_loss,
    functional.mse_loss,
    functional.smooth_l1_loss,
    functional.kl_div,
)
_WATCHED = {*CLASSES, *ELEMENTWISE, functional.ctc_loss}
_REDUCTIONS = frozenset(["mean", "nanmean", "nansum", "sum"])
_DIVISIONS = frozenset(["__itruediv__", "__truediv__", "div", "div_", "divide", "true_divide"])
_SELECTIONS = frozenset(["__getitem__", "gather", "index_select", "masked_select", "take"])
_SUMS = frozenset(["__add__", "__iadd__", "__radd__", "add", "add_"])


@dataclass(frozen=True)
class LossCall:
    """Record of a call of a loss function in a forward pass.

    Attributes:
        function: the function of ``torch.nn.functional``.
        target: its target, in host memory.
        ignored: the label that it ignores, if any.
        reduction: "mean", "sum", "none" or another reduction of torch.
        weighted: whether classes or elements have weights.
        values: its result, in host memory, in fp64.
        columns: batch keys from which the target was made, by any functions of torch.
        returned: its result, detached.
        is_precise: whether the result is in 32 or 64 bits.
        is_selected: whether the target may be a selection of labels, such as those that are not -1,
            so that it lacks the other labels.
    """

    function: Callable[..., Any]
    target: torch.Tensor
    ignored: int | None
    reduction: str
    weighted: bool
    values: torch.Tensor
    columns: frozenset[str] = frozenset()
    returned: torch.Tensor | None = None
    is_precise: bool = True
    is_selected: bool = False

    @property
    def tolerance(self) -> float:
        """Return the relative error allowed in a count of targets that is computed from the loss.

        It is larger for losses in 16 bits.
        """
        return 1e-4 if self.is_precise else 4e-3

    @property
    def is_by_hand(self) -> bool:
        """Tell whether the call took no mean, so that the code around it takes one."""
        return self.reduction in ("none", "sum")

    @property
    def num_targets(self) -> int:
        """Return the number of targets by which a mean of this call divides."""
        if self.function is functional.ctc_loss:
            return self.target.shape[0]
        if self.ignored is not None:
            return int((self.target != self.ignored).sum())
        if self.function in CLASSES and self.target.dim() > 1:
            return self.target.numel() // self.target.shape[1]  # probabilities of classes
        if self.reduction == "batchmean":
            return self.num_rows
        return self.target.numel()

    @property
    def num_rows(self) -> int:
        """Return the size of the target's first dimension, 1 for a target without dimensions."""
        return self.target.shape[0] if self.target.dim() else 1

    def num_in_mean(self, loss: float, valid: torch.Tensor | None = None) -> float:
        """Return the number by which the loss divides, if it is made from this call alone.

        Args:
            loss: loss of the batch.
            valid: mask of the elements of the call's result that count, if a mask is applied later.
        """
        if self.reduction in ("mean", "batchmean"):
            return float(self.num_targets)
        values = self.values
        if valid is not None and self.reduction == "none" and valid.numel() == values.numel():
            values = values.flatten()[valid.flatten()]
        return float(values.sum()) / loss if loss else float("nan")


class TargetCount(int):
    """Count passed to user code, of a type of its own so that its use can be detected."""


class LossCallRecorder(TorchFunctionMode):
    """Torch mode that records calls of loss functions while entered, without changing results.

    Attributes:
        calls: the recorded calls, in order.
        used_count: whether some function of torch was given a ``TargetCount``, such as a division.
        by_rows: whether the loss looks like a mean over samples, in a batch of one sample: a mean
            or sum was taken of a tensor with one element, or a sum was divided by 1. The value of
            the loss does not show this.
        mixed: batch keys of tensors that were combined with results of the calls, such as a mask.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor]) -> None:
        """Set up a recorder without calls.

        Args:
            columns: the tensors of the batch that the forward pass is given, by their keys.
        """
        super().__init__()
        self.calls: list[LossCall] = []
        self.used_count = self.by_rows = False
        self.mixed: frozenset[str] = frozenset()
        # Weak references: without gradients (in an evaluation, inside a re-entrant checkpoint) all
        # tensors that the model computes pass here, and must be freed when the model drops them.
        self._origins: Any = WeakTensorKeyDictionary()
        for name, tensor in columns.items():
            self._origins[tensor] = frozenset([name])
        self._selected: Any = WeakTensorKeyDictionary()
        # Tensors made from results of calls, and whether each is a sum rather than a mean.
        self._made: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``; record it if it is a loss function, and the columns behind its result."""
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        tensors = list(_tensors_in((args, kwargs), self._note_count))
        columns = frozenset().union(*(self._columns_of(tensor) for tensor in tensors))
        name = getattr(func, "__name__", "")
        if func in _WATCHED and isinstance(returned, torch.Tensor):
            call = _record_of(func, args, kwargs, returned, self._columns_of)
            if any(tensor in self._selected for tensor in tensors):
                call = replace(call, is_selected=True)
            self.calls.append(call)
            if call.reduction != "none" or returned.numel() > 1:
                self._made[returned] = call.reduction != "mean"
        else:
            self._follow(name, tensors, args, returned)
        if columns:
            in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            # A tensor that requires gradients depends on the model, so it is no target.
            made = [t for t in _tensors_in(returned, None) if not t.requires_grad]
            is_selected = any(tensor in self._selected for tensor in tensors) or (
                name in _SELECTIONS and len(tensors) > 1
            )
            for tensor in [*made, *tensors[:1]] if in_place else made:
                self._origins[tensor] = columns | self._columns_of(tensor)
                if is_selected:
                    self._selected[tensor] = True
        return returned

    def _follow(self, name: str, tensors: list[torch.Tensor], args: Any, returned: Any) -> None:
        """Track the use of recorded calls' results by another function."""
        made = [tensor for tensor in tensors if tensor in self._made]
        if not made:
            return
        others = [tensor for tensor in tensors if tensor not in self._made]
        self.mixed = self.mixed.union(*(self._columns_of(tensor) for tensor in others))
        is_sum = any(self._made[tensor] for tensor in made)
        if name in _REDUCTIONS:
            self.by_rows = self.by_rows or any(t.dim() and t.numel() == 1 for t in made)
        elif name in _DIVISIONS and is_sum:
            self.by_rows = self.by_rows or any(_equals(a, 1) for a in args[1:])
        elif name in _SUMS and len(made) == 1:
            added = [a for a in args if a is not made[0]]
            is_sum = is_sum or any(_equals(other, 0) for other in added)  # sums begin at 0
        for tensor in _tensors_in(returned, None):
            self._made[tensor] = is_sum

    def _note_count(self, value: Any) -> None:
        self.used_count = self.used_count or isinstance(value, TargetCount)

    def _columns_of(self, value: Any) -> frozenset[str]:
        """Return the batch keys from which a tensor was made; none for other values."""
        known = isinstance(value, torch.Tensor)
        found: frozenset[str] = self._origins.get(value, frozenset()) if known else frozenset()
        return found


def _equals(value: Any, number: int) -> bool:
    """Tell whether a value is this number, or a tensor without gradient with this one element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.requires_grad and float(value) == number
    plain = isinstance(value, (int, float)) and not isinstance(value, TargetCount)
    return plain and value == number


def _tensors_in(value: Any, other: Callable[[Any], None] | None) -> Iterator[torch.Tensor]:
    """Yield the tensors in a function's arguments or result; call ``other`` with other values."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors_in(part, other)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part, other)
    elif other is not None:
        other(value)


def _record_of(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    returned: torch.Tensor,
    columns_of: Callable[[Any], frozenset[str]],
) -> LossCall:
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    is_ctc = function is functional.ctc_loss
    target = values["target_lengths" if is_ctc else "target"]
    ignores = "ignore_index" in values and not target.is_floating_point()
    return LossCall(
        function=function,
        target=torch.as_tensor(target).detach().cpu(),
        ignored=values["ignore_index"] if ignores else None,
        reduction=values["reduction"],
        weighted=values.get("weight") is not None,
        values=returned.detach().double().cpu(),
        columns=columns_of(target),
        returned=returned.detach(),
        is_precise=returned.dtype in (torch.float32, torch.float64),
    )
