"""The order in which a backward pass will bring gradients, computed from its graph."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dstrain.engine.stepping.gradient_arrival import gradient_arrival_order


def arrivals(loss: torch.Tensor, model: nn.Module) -> list[str]:
    """Return the names of parameters in the order in which backward() reaches them."""
    found: list[str] = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
        for name, p in model.named_parameters()
    ]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return found


def foretold(loss: torch.Tensor, model: nn.Module) -> list[str]:
    named = dict(model.named_parameters())
    names = list(named)
    return [names[index] for index in gradient_arrival_order(loss, list(named.values()))]


def modules_in_order(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


class Towers(nn.Module):
    """Two towers of which the one registered first runs last, and a part that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.idle, self.first = (
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)) for _ in range(3)
        )
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x))).sum()


def test_the_order_is_that_of_the_backward_pass() -> None:
    model = Towers()
    loss = model(torch.randn(2, 4))
    told = foretold(loss, model)
    assert sorted(told) == sorted(dict(model.named_parameters()))
    used = [name for name in told if not name.startswith("idle")]
    assert modules_in_order(used) == modules_in_order(arrivals(loss, model))
    # What is not used stands where its neighbour does: behind what is registered after it.
    places = [name.split(".")[0] for name in told]
    assert places.index("idle") == places.index("first") + places.count("first")


def test_a_large_model_of_transformers_is_foretold_to_the_parameter() -> None:
    from tests.models import tiny_llama

    model = tiny_llama()
    tokens = torch.arange(12).view(2, 6)
    loss = model(input_ids=tokens, labels=tokens).loss
    told = foretold(loss, model)
    assert told == arrivals(loss, model)


def test_parts_inside_a_reentrant_checkpoint_stand_between_their_neighbours() -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    hidden = layers[0](torch.randn(2, 4))
    for layer in (layers[1], layers[2]):
        hidden = checkpoint(layer, hidden, use_reentrant=True)
    loss = layers[3](hidden).sum()
    assert modules_in_order(foretold(loss, layers)) == ["3", "2", "1", "0"]


def test_without_a_graph_the_order_is_that_of_registration_backwards() -> None:
    model = Towers()
    assert foretold(torch.zeros(()), model) == list(dict(model.named_parameters()))[::-1]
