"""Errors that say that memory ran out."""

from __future__ import annotations

import pytest
import torch

from dstrain.engine import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_lack_of_memory_is(error: Exception, expected: bool):
    assert is_out_of_memory(error) == expected
