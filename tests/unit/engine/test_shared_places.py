"""Tests of the comparison of two tensors' memory, which itself takes bounded memory."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dstrain.engine.model_checks import shared_places

DTYPES = (torch.uint8, torch.bfloat16, torch.float32)


def places(tensor: torch.Tensor) -> set[int]:
    """List the bytes of a tensor's elements."""
    steps = [
        range(0, n * s, s) if s else [0] for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    size = tensor.element_size()
    starts = (tensor.data_ptr() + sum(at) * size for at in itertools.product(*steps))
    return {start + byte for start in starts for byte in range(size)}


@pytest.mark.parametrize("marked", [1, 7, 2**22])
def test_two_views_overlap_where_they_share_a_byte(monkeypatch, marked):
    monkeypatch.setattr(shared_places, "_MARKED", marked)
    chance = random.Random(3)
    base = torch.zeros(400, dtype=torch.uint8)
    found = []
    for _ in range(400):
        views = []
        for _ in range(2):
            dtype = chance.choice(DTYPES)
            shape = [chance.randint(1, 4) for _ in range(chance.randint(0, 3))]
            stride = [chance.choice([0, 1, 2, 3, 4, 6, 8, 12]) for _ in shape]
            start = chance.randint(0, 20)
            views.append(base.view(dtype).as_strided(shape, stride, start))
        first, second = sorted(views, key=torch.Tensor.data_ptr)
        shares = not places(first).isdisjoint(places(second))
        assert shared_places.share_memory(first, second) == shares, (first, second)
        found.append(shares)
    assert 50 < sum(found) < 350


def test_memory_is_bounded_whatever_the_size_of_the_tensors(monkeypatch):
    marked = []
    zeros = torch.zeros

    def counted(size: int, **kwargs: object) -> torch.Tensor:
        marked.append(size)
        return zeros(size, **kwargs)

    monkeypatch.setattr(torch, "zeros", counted)
    base = torch.empty(200_000, 1000, dtype=torch.uint8)  # never touched
    assert not shared_places.share_memory(base[:, :500], base[:, 500:])
    assert shared_places.share_memory(base[:, :501], base[:, 500:])
    flat = base.flatten()
    assert not shared_places.share_memory(flat[::2], flat[1::2])
    assert shared_places.share_memory(flat[::2], flat[198_000_001::3])
    assert max(marked) < 10_000_000
