"""Parameters of shape (), such as CLIP's ``logit_scale``, which DeepSpeed 0.19.8 cannot send.

It sends whole parameters as bytes, ``dist.broadcast(p.data.view(torch.uint8), ...)``, and torch
cannot see a tensor without dimensions as elements of another size: "self.dim() cannot be 0 to view
Float as Byte". The places are ``engine.py:_broadcast_model`` (all stages), and for stage 3
``partition_parameters.py``: ``Init._zero_init_param``, ``Module.apply`` inside ``zero.Init``, and
the end of ``GatheredParameters`` with a ``modifier_rank``. And at stage 0 in fp32
``utils.py:clip_grad_norm_`` multiplies gradients in place by a tensor of shape (1,), which a
gradient of shape () cannot take. All else works with shape () as it is.

Nothing of DeepSpeed is replaced here, and no parameter changes its shape at any time. The tests of
this module fail once DeepSpeed can do it alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def scalars_as_bytes(*, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Let a tensor of shape () be viewed in another format in the block, like one of shape (1,).

    Only calls change that would raise. Every call of torch from Python passes through it, some
    microseconds each, so it is no place for a training loop.

    Args:
        wanted: False changes nothing.
    """
    return _ScalarsAsBytes() if wanted else contextlib.nullcontext()


def clip_scalars_too(engine: Any) -> None:
    """Let a DeepSpeed engine of stage 0 in fp32 clip with torch's function, which takes any shape.

    Its own method adds up the same norm on every rank and divides by their number.
    """

    def clip_fp32_gradients() -> None:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_fp32_gradients


class _ScalarsAsBytes(TorchFunctionMode):
    """A torch mode that gives ``view(dtype)`` of a tensor of shape () one dimension."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.view and len(args) == 2 and isinstance(args[1], torch.dtype):
            tensor: torch.Tensor = args[0]
            if tensor.dim() == 0 and tensor.dtype.itemsize != args[1].itemsize:
                return func(tensor.view(1), args[1])
        return func(*args, **(kwargs or {}))
