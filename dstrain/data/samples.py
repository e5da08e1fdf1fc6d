"""Access to the columns of a batch, and inference of its number of samples from its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

_SAMPLES_FIRST = ("input_ids", "inputs_embeds", "attention_mask")


def tensors(inputs: Any) -> list[torch.Tensor]:
    """Return all tensors in a batch of any nesting."""
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    elif not isinstance(inputs, (list, tuple)):
        return []
    return [t for part in inputs for t in tensors(part)]


def columns_of(inputs: Any, *, inside: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the columns of a batch that are tensors, by name.

    A column of a mapping in the batch is named by both keys with a dot between: ``labels.start``.
    """
    if isinstance(inputs, Mapping):
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                yield f"{inside}{name}", value
            elif isinstance(value, Mapping):
                yield from columns_of(value, inside=f"{inside}{name}.")


def column(inputs: Any, name: str | None) -> torch.Tensor | None:
    """Return the column to which ``columns_of`` gives this name; None where there is none."""
    return None if name is None else next((t for n, t in columns_of(inputs) if n == name), None)


def with_column(inputs: Any, name: str, changed: torch.Tensor, *, inside: str = "") -> Any:
    """Return a copy of a batch with another tensor in a column; the original is not changed."""
    found: dict[Any, Any] = {}
    for key, value in inputs.items():
        path = f"{inside}{key}"
        if isinstance(value, Mapping) and name.startswith(f"{path}."):
            value = with_column(value, name, changed, inside=f"{path}.")
        found[key] = changed if path == name else value
    return found


def batch_size(inputs: Any) -> int:
    """Return the number of samples in a batch of a user's own loader, inferred from its tensors.

    Uses the first dimension of a label column, else of the usual text inputs, else of the first
    tensor, which may count something else (Qwen2-VL's ``pixel_values`` has a row for each patch). A
    padding-free batch is a single row whose samples are the sequences in it.
    """
    if isinstance(inputs, Mapping):
        if (sequences := _sequences_of_one_row(inputs)) is not None:
            return sequences
        names = [n for n in inputs if isinstance(n, str) and "label" in n]
        for name in (*names, *_SAMPLES_FIRST):
            value = inputs.get(name)
            if isinstance(value, torch.Tensor) and value.dim():
                return value.shape[0]
            if isinstance(value, (list, tuple)) and value:
                return len(value)
    return next((t.shape[0] for t in tensors(inputs) if t.dim()), 1)


def _sequences_of_one_row(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of sequences in a padding-free batch of one row; None for other batches."""
    limits, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if isinstance(limits, torch.Tensor) and limits.dim() == 1:
        return max(1, limits.numel() - 1)
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[0] == 1:
        return max(1, int((positions == 0).sum()))
    return None
