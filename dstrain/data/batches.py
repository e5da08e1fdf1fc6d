"""Counting tokens in batches, finding empty label columns, and moving batches to the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dstrain.core.log import get_logger
from dstrain.data.loss.rule import IGNORED
from dstrain.data.samples import batch_size, columns_of

logger = get_logger(__name__)


def input_tokens(inputs: Any, main_input: str = "input_ids") -> int:
    """Count the tokens in the model's main input, padding included.

    For a main input of floats its rows are counted, and for a batch without one its samples.
    """
    if isinstance(inputs, Mapping):
        main = inputs.get(main_input, inputs.get("input_ids"))
        if isinstance(main, torch.Tensor):
            return main.numel() if not main.is_floating_point() else main.shape[0]
    return batch_size(inputs)


class TokenCount:
    """Counter of input tokens in batches that are still in host memory."""

    def __init__(
        self,
        main_input: str = "input_ids",
        *,
        padding: bool = True,
        pad_token_id: int | None = None,
    ) -> None:
        """Set up a counter.

        Args:
            main_input: batch key of the model's main input.
            padding: whether to count padding.
            pad_token_id: token of padding, used for a batch without ``attention_mask``.
        """
        self._main_input, self._padding, self._pad = main_input, padding, pad_token_id
        self._warned = False

    def __call__(self, inputs: Any) -> int:
        """Return the number of tokens of a batch."""
        if self._padding or not isinstance(inputs, Mapping):
            return input_tokens(inputs, self._main_input)
        mask = inputs.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            return int(mask.sum())
        main = inputs.get(self._main_input)
        if self._pad is not None and isinstance(main, torch.Tensor):
            return int((main != self._pad).sum())
        if not self._warned:
            self._warned = True
            logger.warning(
                "include_num_input_tokens_seen='non_padding' counts padding too: the batch has no "
                "attention_mask, and no padding token is known"
            )
        return input_tokens(inputs, self._main_input)


def empty_columns(inputs: Any) -> frozenset[str]:
    """Return the names of label columns without any target, in a batch in host memory.

    Every label of such a column is ignored or NaN, so that a mean over it is 0/0. A column is read
    whole only if its first label is ignored. Columns on a device are skipped, as reading them would
    wait for the device.
    """
    return frozenset(name for name, values in columns_of(inputs) if _has_no_target(values))


def _has_no_target(values: torch.Tensor) -> bool:
    plain = values.device.type == "cpu" and values.layout is torch.strided and not values.is_nested
    if not plain or not values.numel() or values.dtype == torch.bool or values.is_complex():
        return False
    first = values[(0,) * values.dim()].item()
    if first != IGNORED and first == first:
        return False
    ignored = values.isnan() if values.is_floating_point() else values == IGNORED
    return bool(ignored.all())


def to_device(inputs: Any, device: Any, *, float_dtype: torch.dtype | None) -> Any:
    """Copy a batch to ``device`` without waiting, with float tensors in ``float_dtype``."""
    if isinstance(inputs, torch.Tensor):
        dtype = float_dtype if inputs.is_floating_point() else None
        return inputs.to(device=device, dtype=dtype, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {k: to_device(v, device, float_dtype=float_dtype) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        parts = [to_device(v, device, float_dtype=float_dtype) for v in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs
