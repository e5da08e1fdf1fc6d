"""Every family of the zoo is what it says: small, the same at every call, ragged, with a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families.family import Family
from tests.families.zoo import FAMILIES

MAX_PARAMETERS = 300_000


def loss_of(output: Any) -> torch.Tensor:
    """Return the loss of a model's output, whatever form it has."""
    return output["loss"] if hasattr(output, "keys") else output[0]


def num_targets(family: Family, sample: dict[str, torch.Tensor]) -> int:
    """Count the labels of one sample that are not ignored, in all of its label columns."""
    columns = family.labels or ("labels",)
    found = [sample[name] for name in columns if name in sample]
    return sum(int((labels != family.ignored).sum()) for labels in found)


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    """Forward and backward in training mode, twice from new, give the same finite numbers."""
    family, seen = FAMILIES[name], []
    for _ in range(2):
        model = family.build().train()
        size = sum(p.numel() for p in model.parameters())
        assert size < MAX_PARAMETERS
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        samples = family.samples(8)
        assert len(samples) == 8
        torch.manual_seed(len(seen))  # nothing may be drawn in the forward pass
        loss = loss_of(model(**family.collate(samples)))
        assert loss.dim() == 0
        assert loss.isfinite()
        loss.backward()
        grads = [p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None]
        norm = torch.stack(grads).sum().sqrt()
        assert norm.isfinite()
        assert norm > 0
        seen.append((loss.item(), norm.item()))
    assert seen[0] == seen[1]
    if family.kind in ("shifted", "targets"):
        assert len({num_targets(family, sample) for sample in samples}) > 1
