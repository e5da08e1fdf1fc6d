"""Adagrad of torch: keeping DeepSpeed from replacing it, and making its state later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch


def make_adagrad_lazy(optimizer: Any) -> None:
    """Let an Adagrad of torch make the state of a tensor when it first needs that.

    torch makes it in the constructor, for the parameters there; DeepSpeed then replaces these by
    other tensors. To be called before the engine is built.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state = cast(Any, _AdagradState(optimizer))


@contextlib.contextmanager
def without_adagrad_replacement() -> Iterator[None]:
    """Keep DeepSpeed from replacing torch's Adagrad by another optimizer inside the block.

    ``initialize_optimizer_states`` of the ZeRO stages makes a new ``torch.optim.Adagrad`` of the
    flat tensors, with one group: the schedule would steer the old one, the weight decay of the
    groups would be lost, and stage 3 would not find its second group. It does so because
    Adagrad makes its state at once, which ``make_adagrad_lazy`` has mended; inside this block
    DeepSpeed finds no Adagrad.
    """
    real = torch.optim.Adagrad
    torch.optim.Adagrad = _NoAdagrad  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.optim.Adagrad = real  # type: ignore[misc]


class _NoAdagrad:
    """A stand-in for Adagrad's class while DeepSpeed asks whether an optimizer is one."""


class _AdagradState(dict[Any, Any]):
    """Adagrad's state, made for a tensor when it is first asked for (torch/optim/adagrad.py)."""

    def __init__(self, optimizer: torch.optim.Adagrad) -> None:
        super().__init__()
        self._optimizer = optimizer

    def __missing__(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        start = self._optimizer.defaults["initial_accumulator_value"]
        value = complex(start, start) if torch.is_complex(tensor) else start
        self[tensor] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "sum": torch.full_like(tensor, value, memory_format=torch.preserve_format),
        }
        return self[tensor]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
