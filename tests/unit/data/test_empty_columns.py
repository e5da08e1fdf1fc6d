"""Columns of a batch in which no label is a target."""

from __future__ import annotations

import pytest
import torch

from dstrain.data import empty_columns

IGNORED, NAN = -100, float("nan")


@pytest.mark.parametrize(
    ("values", "is_empty"),
    [
        (torch.full((2, 3), IGNORED), True),
        (torch.tensor([[IGNORED, IGNORED], [IGNORED, 5]]), False),
        (torch.tensor([5, IGNORED]), False),
        (torch.tensor(IGNORED), True),
        (torch.full((3,), NAN), True),
        (torch.tensor([NAN, 1.0]), False),
        (torch.full((2,), float(IGNORED)), False),  # a number like any other
        (torch.zeros((0, 4), dtype=torch.long), False),
        (torch.zeros(2, dtype=torch.bool), False),
        (torch.full((2, 2), IGNORED).to_sparse(), False),
    ],
)
def test_a_column_is_empty_if_every_label_is_ignored(values: torch.Tensor, is_empty: bool) -> None:
    found = empty_columns({"a": values, "ids": torch.arange(4)})
    assert found == ({"a"} if is_empty else set())


def test_columns_inside_of_columns_have_both_names() -> None:
    assert empty_columns({"labels": {"end": torch.tensor([IGNORED])}}) == {"labels.end"}
