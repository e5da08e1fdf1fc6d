"""Copies in host memory: of the moment, and in the memory of the round before."""

from __future__ import annotations

import pytest
import torch

from dstrain.models import HostCopies


def test_a_copy_is_of_the_moment() -> None:
    copies, values = HostCopies(), torch.arange(6.0)
    copies.begin()
    copy = copies.copy("a", values.view(2, 3).t())
    copies.end()
    values.zero_()
    assert copy.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copy.is_contiguous()


def test_a_parameter_leaves_no_gradient_behind() -> None:
    assert not HostCopies().copy("a", torch.nn.Parameter(torch.ones(2))).requires_grad


def test_a_second_round_overwrites_the_first() -> None:
    copies = HostCopies()
    copies.begin()
    first = copies.copy("a", torch.ones(4))
    copies.end()
    copies.begin()
    second = copies.copy("a", torch.zeros(4))
    copies.end()
    assert second.data_ptr() == first.data_ptr()
    assert first.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(2, 2), torch.zeros(4).half()])
def test_another_shape_or_format_has_memory_of_its_own(other: torch.Tensor) -> None:
    copies = HostCopies()
    copies.begin()
    first = copies.copy("a", torch.ones(4))
    copies.begin()
    second = copies.copy("a", other)
    assert (second.shape, second.dtype) == (other.shape, other.dtype)
    assert first.tolist() == [1, 1, 1, 1]


def test_what_a_round_did_not_use_is_freed() -> None:
    import weakref

    copies = HostCopies()
    copies.begin()
    gone, kept = (weakref.ref(copies.copy(name, torch.ones(3))) for name in ("gone", "kept"))
    copies.end()
    copies.begin()
    copies.copy("kept", torch.ones(3))
    copies.end()
    assert (gone() is None, kept() is None) == (True, False)
    copies.free()
    assert kept() is None
