"""Shards of parameters, dividing them among ranks, optimizer state made before a first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dstrain.core.errors import CheckpointError
from dstrain.engine.state.layouts import locate_shards, optimized_names
from dstrain.engine.state.optimizer_state import (
    create_state,
    group_values,
    read_scalars,
    set_group_values,
)
from dstrain.engine.state.shards import (
    MASTER,
    WEIGHT,
    StateShard,
    shards_to_write,
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def train(module: nn.Module, optimizer: Any, steps: int, *, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 3, generator=draw)).square().mean().backward()
        optimizer.step()


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "AMSGrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),  # a scalar product beside the step
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),  # no state at all
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),  # has state from the start
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_was_taken_apart_goes_on_as_if_nothing_had_happened(name):
    """Any optimizer of torch, through names, runs of numbers and scalars."""
    first, second = small_model(), small_model()
    old, new = (OPTIMIZERS[name](two_groups(m)) for m in (first, second))
    train(first, old, 3, seed=1)
    held, empty = locate_shards(first, old), locate_shards(second, new)
    keys = {r.name: r.tensor_keys() for r in held}
    scalars = {n: read_scalars(held).get(n, {}) for n, found in keys.items() if len(found) > 1}
    create_state(empty, scalars)
    for source, target in zip(held, empty, strict=True):
        assert target.tensor_keys() == keys[source.name]
        for key in keys[source.name]:
            middle = source.numel // 2
            target.write(key, 0, source.read(key)[:middle].clone())
            target.write(key, middle, source.read(key)[middle:].clone())
    set_group_values(new, group_values(old))
    for module, optimizer in ((first, old), (second, new)):
        train(module, optimizer, 3, seed=2)
    for (_, expected), (_, found) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected)


def test_before_the_first_step_there_is_nothing_but_values():
    """And looking for state must not create an entry, which the optimizer would take for state."""
    module = small_model()
    optimizer = torch.optim.AdamW(module.parameters())
    held = locate_shards(module, optimizer)
    assert [r.tensor_keys() for r in held] == [[MASTER]] * 6
    assert read_scalars(held) == {}
    assert len(optimizer.state) == 0


def test_what_no_optimizer_updates_is_there_as_weight():
    """Frozen, or left out of the user's own optimizer."""
    module = small_model()
    module[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(module[2].parameters())
    keys = {r.name: r.value_key for r in locate_shards(module, optimizer)}
    assert optimized_names(module, optimizer) == ["2.weight", "2.bias"]
    assert [n for n, key in keys.items() if key == WEIGHT] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_every_element_is_written_by_exactly_one_rank(world_size):
    """Also with more ranks than elements of most parameters, and evenly."""
    module = small_model()
    module[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    held = locate_shards(module, optimizer)
    written = {name: torch.zeros(p.numel()) for name, p in module.named_parameters()}
    sizes = []
    for rank in range(world_size):
        mine = shards_to_write(held, replicated=True, rank=rank, world_size=world_size)
        sizes.append(sum(r.numel for r in mine))
        for shard in mine:
            written[shard.name][shard.start : shard.stop] += 1
            whole = dict(module.named_parameters())[shard.name].detach().reshape(-1)
            assert torch.equal(shard.read(shard.value_key), whole[shard.start : shard.stop])
    assert all((count == 1).all() for count in written.values())
    assert max(sizes) - min(sizes) <= 1


def test_a_tensor_that_is_not_contiguous_is_read_and_written_in_order():
    """Channels-last weights at stage 0."""
    values = torch.arange(24.0).view(2, 3, 4)
    holder = values.clone().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not holder.is_contiguous()
    shard = StateShard("w", 4, 10, (2, 3, 4), holder, 4)
    assert torch.equal(shard.read(WEIGHT), torch.arange(4.0, 14.0))
    shard.write(WEIGHT, 6, torch.tensor([-1.0, -2.0]))
    assert holder.reshape(-1)[5:9].tolist() == [5.0, -1.0, -2.0, 8.0]


def test_state_of_another_shape_is_refused():
    """A factored moment has no element for each element of the parameter."""
    module = nn.Linear(4, 4)
    optimizer = torch.optim.Adafactor(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"has shape \(4, 1\)"):
        [r.tensor_keys() for r in locate_shards(module, optimizer)]


class Unusual(torch.optim.SGD):
    """Keeps what neither a slice nor a number is."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = {"here"}


def test_state_of_another_type_is_refused():
    """It would be lost without a word."""
    module = small_model()
    optimizer = Unusual(module.parameters(), lr=0.1)
    optimizer.step()
    with pytest.raises(CheckpointError, match="'seen' of 0.weight is a set"):
        [r.tensor_keys() for r in locate_shards(module, optimizer)]
