"""Support for parameters of shape (), such as CLIP's ``logit_scale``, with DeepSpeed 0.19.8.

DeepSpeed sends whole parameters as bytes, ``dist.broadcast(p.data.view(torch.uint8), ...)``, and
torch cannot view a tensor without dimensions in a format of another size: "self.dim() cannot be 0
to view Float as Byte". DeepSpeed does so in ``engine.py:_broadcast_model`` (all stages), and for
stage 3 in ``partition_parameters.py``: ``Init._zero_init_param``, ``Module.apply`` inside
``zero.Init``, and the end of ``GatheredParameters`` with a ``modifier_rank``. And at stage 0 in
fp32 ``utils.py:clip_grad_norm_`` multiplies gradients in place by a tensor of shape (1,), which
fails for a gradient of shape (). Everything else works with shape ().

No parameter changes its shape at any time. The tests of this module fail once DeepSpeed handles
such parameters itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def scalars_as_bytes(*, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Let a tensor of shape () be viewed in another format in the block, as if it had shape (1,).

    Calls that work without this are not changed. In the block every call of torch from Python
    takes some microseconds more, so it must not contain a training loop.

    Args:
        wanted: False returns a context manager that does nothing.
    """
    return _ScalarsAsBytes() if wanted else contextlib.nullcontext()


def clip_scalars_too(engine: Any) -> None:
    """Let a DeepSpeed engine of stage 0 in fp32 clip with torch's function, which takes any shape.

    The result is the same: DeepSpeed's method averages the norm over the ranks, which all have the
    same gradients.
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
        """Call a function of torch; a tensor of shape () gets the shape (1,) before ``view``."""
        if func is torch.Tensor.view and len(args) == 2 and isinstance(args[1], torch.dtype):
            tensor: torch.Tensor = args[0]
            if tensor.dim() == 0 and tensor.dtype.itemsize != args[1].itemsize:
                return func(tensor.view(1), args[1])
        return func(*args, **(kwargs or {}))
