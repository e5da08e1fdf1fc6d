"""Columns of a dataset that a model accepts, and its label columns."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from dstrain.core.adapters import inner_model
from dstrain.core.errors import DataError, Problem
from dstrain.data.loader import Collator


def forward_columns(module: torch.nn.Module) -> list[str] | None:
    """Return the names of ``forward``'s arguments; None when it has only ``*args``/``**kwargs``."""
    parameters = inspect.signature(inner_model(module).forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in parameters if p.kind in plain]
    return names or None


def label_columns(module: torch.nn.Module, given: Sequence[str] | None) -> list[str]:
    """Return the label names given by the user, or those in the signature of ``forward``.

    A ``forward`` without named arguments (a wrapper's ``**kwargs``) is assumed to pass on "labels".
    """
    if given is not None:
        return list(given)
    columns = forward_columns(module)
    names = ["labels"] if columns is None else [n for n in columns if "label" in n]
    if "QuestionAnswering" in type(inner_model(module)).__name__:
        names += ["start_positions", "end_positions"]
    return names


def takes_target_count(module: torch.nn.Module) -> bool:
    """Tell whether ``forward`` names ``num_items_in_batch``, to divide a summed loss by it."""
    return "num_items_in_batch" in (forward_columns(module) or [])


def needs_target_count(module: torch.nn.Module) -> bool:
    """Tell whether ``forward`` requires the argument ``num_items_in_batch``."""
    parameters = inspect.signature(inner_model(module).forward).parameters
    given = parameters.get("num_items_in_batch")
    return given is not None and given.default is inspect.Parameter.empty


def returns_loss(module: torch.nn.Module) -> bool:
    """Tell whether the model returns a loss without labels, as contrastive models do."""
    parameter = inspect.signature(inner_model(module).forward).parameters.get("return_loss")
    return parameter is not None and parameter.default is True


def keep_columns(
    dataset: Any, collate: Collator, keep: Sequence[str], *, description: str
) -> tuple[Any, Collator]:
    """Drop the columns of ``dataset`` that are not in ``keep``.

    Columns of a ``datasets.Dataset`` are removed before it is read. Samples of other datasets are
    filtered by the returned collator, which also raises the error.

    Returns:
        The dataset and the collator to use.

    Raises:
        DataError: no column is left.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        dropped = [c for c in dataset.column_names if c not in keep]
        if len(dropped) == len(dataset.column_names):
            raise _none_left(dataset.column_names, keep, description)
        return dataset.remove_columns(dropped), collate
    return dataset, _ColumnFilter(collate, tuple(keep), description)


def _none_left(columns: Sequence[str], keep: Sequence[str], description: str) -> DataError:
    return DataError(
        Problem(
            f"the {description} set has columns {list(columns)}",
            f"the model takes none of them; it takes {', '.join(keep)}",
            "rename the columns, or set remove_unused_columns to false and collate them yourself",
        )
    )


class _ColumnFilter:
    """Collator that first drops keys of dict samples; a class, so that workers can pickle it."""

    def __init__(self, collate: Collator, keep: tuple[str, ...], description: str) -> None:
        self._collate = collate
        self._keep = keep
        self._description = description

    def __call__(self, samples: list[Any]) -> Any:
        if samples and isinstance(samples[0], dict):
            columns = list(samples[0])
            samples = [{k: v for k, v in s.items() if k in self._keep} for s in samples]
            if columns and not samples[0]:
                raise _none_left(columns, self._keep, self._description)
        return self._collate(samples)


def used_columns(collate: Any) -> tuple[str, ...] | None:
    """Return the keys of dict samples that a collator of ``keep_columns`` keeps; None for all."""
    return collate._keep if isinstance(collate, _ColumnFilter) else None
