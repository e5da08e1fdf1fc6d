"""Flattening of nested model outputs (tuples, lists, dicts) to tensors, and restoring them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dstrain.core.errors import DataError, Problem


@dataclass(frozen=True)
class Layout:
    """Structure of a nested value without its tensors; equal for values that are nested alike.

    Attributes:
        kind: "tensor", "none", "tuple", "list", "dict", or "objects" for a list of any objects, one
            per sample, which is sent pickled.
        keys: keys of a dict.
        parts: structures of the parts of a tuple, list or dict.
    """

    kind: str
    keys: tuple[Any, ...] = ()
    parts: tuple[Layout, ...] = ()

    def fill(self, leaves: Iterator[Any], empty: Callable[[], Any] = lambda: None) -> Any:
        """Return the nested value with ``leaves`` for its tensors, in the order of ``take_apart``.

        Args:
            leaves: a leaf for each tensor or list of objects.
            empty: returns the value to use for None.
        """
        if self.kind in ("tensor", "objects"):
            return next(leaves)
        if self.kind == "none":
            return empty()
        values = [part.fill(leaves, empty) for part in self.parts]
        if self.kind == "dict":
            return dict(zip(self.keys, values, strict=True))
        return tuple(values) if self.kind == "tuple" else values


def take_apart(value: Any, path: str, *, objects: bool = False) -> tuple[Layout, list[Any]]:
    """Return the layout of a nested value, and its leaves: tensors with at least one dimension.

    Args:
        value: tensors, arrays, numbers and None in tuples, lists and mappings.
        path: name of the value for messages.
        objects: take a list, or a value with anything but tensors, as a single leaf: a list with an
            entry per sample.

    Raises:
        DataError: the value has something that is no tensor, and ``objects`` is false.
    """
    if objects and (isinstance(value, list) or not _is_tensors(value)):
        return Layout("objects"), [list(value) if isinstance(value, (list, tuple)) else [value]]
    leaves: list[Any] = []
    return _take(value, path, leaves), leaves


def _take(value: Any, path: str, leaves: list[Any]) -> Layout:
    if value is None:
        return Layout("none")
    if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        value = torch.as_tensor(value)
    if isinstance(value, torch.Tensor):
        leaves.append(value.detach().reshape(1) if value.dim() == 0 else value.detach())
        return Layout("tensor")
    if isinstance(value, Mapping):
        parts = tuple(_take(v, f"{path}[{k!r}]", leaves) for k, v in value.items())
        return Layout("dict", tuple(value), parts)
    if isinstance(value, (tuple, list)):
        parts = tuple(_take(v, f"{path}[{i}]", leaves) for i, v in enumerate(value))
        return Layout("list" if isinstance(value, list) else "tuple", (), parts)
    raise DataError(
        Problem(
            f"{path} is a {type(value).__name__}",
            "only tensors can be joined over batches and ranks",
            "name it in ignore_keys, override prediction_step, or set eval_use_gather_object",
        )
    )


def _is_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_tensors(v) for v in value.values())
    if isinstance(value, tuple):
        return all(_is_tensors(v) for v in value)
    return value is None or isinstance(value, (torch.Tensor, np.ndarray, np.generic, int, float))
