"""Casting of a batch's floats to the dtype of the model, except labels, and dtypes of losses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dstrain.core.adapters import inner_model
from dstrain.core.errors import ModelError, Problem
from dstrain.core.log import get_logger
from dstrain.data.batches import to_device
from dstrain.data.samples import tensors

logger = get_logger(__name__)

# Families that feed float labels into their layers, which accept the model's dtype only.
_LABELS_ARE_INPUTS = frozenset({"speecht5"})
# Losses that torch would compute partly in the narrower of two dtypes, or not at all: for mixed
# dtypes mse_loss has no gradient up to torch 2.11, and huber_loss still has none.
_LOSSES: frozenset[Any] = frozenset(
    {
        functional.mse_loss,
        functional.l1_loss,
        functional.smooth_l1_loss,
        functional.huber_loss,
        functional.binary_cross_entropy,
        functional.binary_cross_entropy_with_logits,
        functional.cross_entropy,
        functional.kl_div,
        torch.cdist,
    }
)
_ABOUT_FORMATS = re.compile(r"dtype|scalar type|same type")
# An input that is rounded by more than this is no activation but a time, a count or an id.
_ROUNDED_MUCH = 0.5


class InputFormats:
    """Cast of a batch's floats to the model's dtype, except for labels.

    Layers in 16 bits take inputs in 16 bits only, so all floats but labels are cast. Labels are
    compared with the model's outputs: rounded to 16 bits they would be other labels and give
    another loss. A loss is computed in the wider of the dtypes of outputs and labels.
    """

    def __init__(self, module: torch.nn.Module, labels: Sequence[str]) -> None:
        """Set up for a model.

        Args:
            module: the model.
            labels: batch keys of labels, in addition to all keys that contain "label".
        """
        self._labels = frozenset(labels)
        config = getattr(inner_model(module), "config", None)
        self._casts_labels = getattr(config, "model_type", None) in _LABELS_ARE_INPUTS
        self._name = type(inner_model(module)).__name__
        self._looked_at: set[str] = set()

    def __call__(self, inputs: Any, device: Any, dtype: torch.dtype) -> Any:
        """Copy a batch to ``device`` without waiting, with floats except labels in ``dtype``.

        Args:
            inputs: the batch, as the collator made it.
            device: device of the model.
            dtype: dtype in which the model computes.
        """
        if not isinstance(inputs, Mapping):
            return to_device(inputs, device, float_dtype=dtype)
        moved = {}
        for name, value in inputs.items():
            keeps = self._is_label(name) and not self._casts_labels
            if not keeps and name not in self._looked_at:
                self._looked_at.add(name)
                self._warn_of_rounding(name, value, dtype)
            moved[name] = to_device(value, device, float_dtype=None if keeps else dtype)
        return moved

    @contextlib.contextmanager
    def computing_loss(self, inputs: Any, dtype: torch.dtype) -> Iterator[None]:
        """Let the forward pass in the body compute its loss with labels in another float dtype.

        Args:
            inputs: the batch, as ``__call__`` returned it.
            dtype: dtype in which the model computes.

        Raises:
            ModelError: the model uses labels in an operation that needs the model's dtype.
        """
        columns = self._label_formats(inputs, dtype)
        if not columns:
            yield
            return
        try:
            with _Promoting():
                yield
        except RuntimeError as error:
            if not _ABOUT_FORMATS.search(str(error)):
                raise
            raise ModelError(
                Problem(
                    f"{self._name} computes in {_named(dtype)}, and {' and '.join(columns)}, as "
                    "the data has it",
                    f"labels are not rounded to the model's format; torch says: {error}",
                    "in forward, compare labels with predictions.float(), or cast them where they "
                    "go into a layer; or let the collator give them in the model's format",
                )
            ) from error

    def _label_formats(self, inputs: Any, dtype: torch.dtype) -> list[str]:
        """Describe the label columns that have another float dtype than ``dtype``."""
        if not isinstance(inputs, Mapping):
            return []
        found = []
        for name, value in inputs.items():
            formats = {t.dtype for t in tensors(value) if t.is_floating_point()} - {dtype}
            if self._is_label(name) and formats:
                found.append(f"{name} is in {' and '.join(sorted(map(_named, formats)))}")
        return found

    def _is_label(self, name: Any) -> bool:
        return name in self._labels or (isinstance(name, str) and "label" in name)

    def _warn_of_rounding(self, name: str, value: Any, dtype: torch.dtype) -> None:
        """Warn if the cast rounds values of a column much; check only tensors in host memory."""
        for tensor in tensors(value):
            if not (tensor.is_floating_point() and tensor.is_cpu and tensor.numel()):
                continue
            error = (tensor.to(dtype).to(tensor.dtype) - tensor).abs()
            error = error.where(tensor.isfinite(), 0.0).flatten()
            place = int(error.argmax())
            if self._is_label(name) and bool(error[place]):
                what = f"{self._name} feeds labels into its layers"
            elif float(error[place]) > _ROUNDED_MUCH:
                what = "a model's inputs go into its layers"
            else:
                continue
            logger.warning(
                "%s is rounded to %s, the model's format: %s becomes %s. (%s.) Scale it, or give "
                "whole numbers as integers",
                name,
                _named(dtype),
                float(tensor.flatten()[place]),
                float(tensor.flatten()[place].to(dtype)),
                what,
            )
            return


class _Promoting(TorchFunctionMode):
    """Torch mode that computes losses in the widest of their arguments' float dtypes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _LOSSES:
            return func(*args, **kwargs)
        formats = [t.dtype for t in tensors([args, kwargs]) if t.is_floating_point()]
        widest = formats[0]
        for dtype in formats[1:]:
            widest = torch.promote_types(widest, dtype)
        return func(*(_in_format(a, widest) for a in args), **_in_format(kwargs, widest))


def _in_format(value: Any, dtype: torch.dtype) -> Any:
    """Cast float tensors, also in a dict, to ``dtype``, with gradients; return other values."""
    if isinstance(value, dict):
        return {name: _in_format(part, dtype) for name, part in value.items()}
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
