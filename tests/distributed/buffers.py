"""Reading and comparing the buffers of models, for tests of buffers that training changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STATE = {
    "mean", "code", "passing", "count", "average",
    "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
}  # fmt: skip


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def on_all_ranks(model: nn.Module) -> list[dict[str, Any]]:
    from dstrain.core.ranks import gather_objects

    return gather_objects({name: b.tolist() for name, b in model.named_buffers()})


def assert_equal(found: Any, expected: Any, *, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    assert found.keys() == expected.keys()
    for name in expected.keys() - but:
        assert torch.equal(found[name], expected[name]), name


TOPOLOGIES = {"main": 1, "apart": 1, "three": 3}
