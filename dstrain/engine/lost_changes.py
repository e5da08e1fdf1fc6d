"""Refusing in-place changes of partitioned parameters in a forward pass, which would be lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dstrain.core.errors import Problem, TrainingError
from dstrain.engine.zero import full_numel, is_partitioned

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
# These end like functions that change values, and change none.
_HARMLESS = frozenset(["requires_grad_", "retain_grad_", "share_memory_", "rename_", "detach_"])


class LostChanges(TorchFunctionMode):
    """A torch mode that ends a forward pass which changes parameters in parts in place.

    A module that averages its weights in ``forward`` (an EMA teacher) finds tensors without
    elements at stage 3, where torch does nothing and says nothing. DeepSpeed gathers the parameters
    of a module only for that module's own forward pass.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Note the names of the parameters of ``module``."""
        super().__init__()
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._data: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``.

        Raises:
            TrainingError: it would change a parameter that is in parts.
        """
        returned = func(*args, **(kwargs or {}))
        if func == _DATA:
            if name := self._name_of(args[0]):
                self._data[returned] = name
            return returned
        name = getattr(func, "__name__", "")
        changes = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
        if (changes or name == "__setitem__") and args and not _is_called_by_deepspeed():
            for tensor in _tensors(args[0]):
                lost = self._name_of(tensor) or self._data.get(tensor)
                if lost:
                    raise _lost(lost, name)
        return returned

    def _name_of(self, value: Any) -> str | None:
        """Return the name of a parameter of which this rank has no element now, or None."""
        if not isinstance(value, torch.nn.Parameter) or not is_partitioned(value):
            return None
        is_away = value.numel() == 0 and full_numel(value) > 0
        return self._names.get(id(value), "a parameter") if is_away else None


def _lost(parameter: str, function: str) -> TrainingError:
    return TrainingError(
        Problem(
            f"the forward pass changes {parameter} in place ({function}) while it is in parts",
            "at ZeRO stage 3 a parameter has no elements outside of its own module's forward pass, "
            "so the change would be lost",
            "gather it with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), keep "
            "such an average in buffers, or set zero_stage to 2",
        )
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield a tensor, or those of a list that a ``_foreach`` function is given."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (tensor for tensor in value if isinstance(tensor, torch.Tensor))


def _is_called_by_deepspeed() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__")).split(".")[0]
        if package != "torch" and frame.f_code.co_name != "__torch_function__":
            return package == "deepspeed"
        frame = frame.f_back
    return False
