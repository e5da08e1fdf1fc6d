"""Corrections for torch's Adagrad, which DeepSpeed would replace by another instance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch


def make_adagrad_lazy(optimizer: Any) -> None:
    """Let torch's Adagrad create the state of a tensor when it is first used.

    torch creates it in the constructor, for the parameters that are passed there, which DeepSpeed
    then replaces by flat tensors. Does nothing for other optimizers. To be called before the engine
    is built.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state = cast(Any, _AdagradState(optimizer))


@contextlib.contextmanager
def without_adagrad_replacement() -> Iterator[None]:
    """Keep DeepSpeed from replacing torch's Adagrad by another optimizer inside the block.

    ``initialize_optimizer_states`` of the ZeRO stages makes a new ``torch.optim.Adagrad`` of the
    flat tensors, with one group: the schedule would set the rates of the old one, the weight decay
    of the groups would be lost, and stage 3 would not find its second group. DeepSpeed does so
    because Adagrad creates its state in the constructor, which ``make_adagrad_lazy`` changes.
    Inside this block DeepSpeed's ``isinstance`` checks find no Adagrad.
    """
    real = torch.optim.Adagrad
    torch.optim.Adagrad = _NoAdagrad  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.optim.Adagrad = real  # type: ignore[misc]


class _NoAdagrad:
    """A class without instances, which stands for Adagrad in DeepSpeed's ``isinstance`` checks."""


class _AdagradState(dict[Any, Any]):
    """State of Adagrad, created for a tensor at its first use (torch/optim/adagrad.py)."""

    def __init__(self, optimizer: torch.optim.Adagrad) -> None:
        """Begin without state of any tensor."""
        super().__init__()
        self._optimizer = optimizer

    def __missing__(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Create the state of a tensor, as Adagrad's constructor does."""
        start = self._optimizer.defaults["initial_accumulator_value"]
        value = complex(start, start) if torch.is_complex(tensor) else start
        self[tensor] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "sum": torch.full_like(tensor, value, memory_format=torch.preserve_format),
        }
        return self[tensor]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain dict."""
        return dict, (dict(self),)
