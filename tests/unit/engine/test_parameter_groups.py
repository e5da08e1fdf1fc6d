"""The values of parameter groups that training changes, restored in another optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dstrain.core.errors import CheckpointError
from dstrain.engine.state.optimizer_state import group_values, set_group_values


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]


def test_another_number_of_groups_is_refused_unless_they_are_alike(caplog):
    """Groups that differ in weight decay only share rates and momenta: those fit any number."""
    module = small_model()
    one = torch.optim.SGD(module.parameters(), lr=0.1)
    two = torch.optim.SGD(two_groups(module), lr=0.3, momentum=0.5)
    set_group_values(one, group_values(two))
    assert (one.param_groups[0]["lr"], one.param_groups[0]["momentum"]) == (0.3, 0.5)
    assert "2 parameter groups were alike" in caplog.text
    one.param_groups[0]["lr"] = 0.7
    set_group_values(two, group_values(one))
    assert [g["lr"] for g in two.param_groups] == [0.7, 0.7]
    two.param_groups[1]["lr"] = 0.2
    with pytest.raises(CheckpointError, match="has 2 parameter groups, this run 1"):
        set_group_values(one, group_values(two))


def test_what_nothing_changes_in_training_is_the_new_runs():
    """A changed weight decay counts; the rate that a schedule has reached comes back."""
    module = small_model()
    old = torch.optim.AdamW(module.parameters(), lr=0.3, weight_decay=0.1, betas=(0.8, 0.9))
    new = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.2)
    set_group_values(new, group_values(old))
    (group,) = new.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.3, 0.2, (0.8, 0.9))
