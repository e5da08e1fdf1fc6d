"""Whole values for constructors of modules that read partitioned parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dstrain.core.errors import ModelError, Problem
from dstrain.engine import (
    gathered,
    is_whole,
)

# Functions that read values or, where their name ends with "_", change them. Not conversions, such
# as ``half``: ``Module.half()`` would put what it gets into the parameter.
_VALUES = (
    "abs abs_ add add_ all any cat chunk clone copy_ detach div div_ expand fill_ flatten item "
    "linear matmul max mean min mul mul_ narrow neg norm normal_ numpy permute pow repeat reshape "
    "select split sqrt squeeze stack std sub sub_ sum t tolist transpose unbind uniform_ unsqueeze "
    "view zero_ __add__ __getitem__ __matmul__ __mul__ __neg__ __pow__ __radd__ __rmul__ __rsub__ "
    "__setitem__ __sub__ __truediv__"
)
_USES_VALUES = frozenset(_VALUES.split())
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class ValuesForConstructors(TorchFunctionMode):
    """A torch mode that gathers partitioned parameters whose values a constructor reads.

    As that of DETR's backbone, which copies the weights of each BatchNorm into another module. What
    is read is a copy; a change of it is one of the parameter. Only constructors are served, as
    these run on all ranks: gathering is a collective.
    """

    def __init__(self) -> None:
        """Begin with nothing read."""
        super().__init__()
        self._copies: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, with whole parameters where a constructor needs values: a collective."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        is_copy = bool(args) and isinstance(args[0], torch.Tensor) and args[0] in self._copies
        if in_place and is_copy:
            return self._change(func, self._copies[args[0]], *args, **kwargs)
        if name in _USES_VALUES or func == _DATA:
            parts = [p for p in _parameters_in((args, kwargs)) if not is_whole(p)]
            if parts and _is_in_constructor(of_user=func == _DATA):
                with gathered(parts, write_from=0 if in_place else None):
                    returned = func(*args, **kwargs)
                    is_all = name == "detach" or func == _DATA
                    return (
                        returned
                        if in_place
                        else self._copied(returned, parts[0] if is_all else None)
                    )
        returned = func(*args, **kwargs)
        if is_copy and isinstance(returned, torch.Tensor):
            storages = (args[0].untyped_storage(), returned.untyped_storage())
            if storages[0].data_ptr() == storages[1].data_ptr():
                self._copies[returned] = None  # a part of it
        return returned

    def _change(self, func: Any, parameter: Any, copy: torch.Tensor, *args: Any, **kw: Any) -> Any:
        """Change a parameter as its copy would be changed, and the copy; a collective.

        Raises:
            ModelError: the copy is of a part of the parameter alone.
        """
        if parameter is None:
            raise ModelError(
                Problem(
                    f"a constructor changes a part of a weight in place ({func.__name__})",
                    "the weight is in parts already, on all ranks, and the change would be lost",
                    "build the model outside of the block, or set zero_stage to 2",
                )
            )
        with gathered([parameter], write_from=0), torch.no_grad():
            func(parameter.data, *args, **kw)
            copy.copy_(parameter.data)
        return copy

    def _copied(self, value: Any, parameter: torch.nn.Parameter | None) -> Any:
        """Return a copy of what was read, so that the gathered weight can be freed.

        Args:
            value: what was read.
            parameter: what it is all of, if that is so.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self._copied(part, None) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.clone()
        self._copies[copy] = parameter
        return copy


def _is_in_constructor(*, of_user: bool) -> bool:
    """Tell whether a module is being constructed.

    Args:
        of_user: whether that must be done by the function that calls torch here, and not by
            DeepSpeed, which takes parameters apart at the end of a constructor, or by dstrain.
    """
    frame = inspect.currentframe()
    asked = False
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).split(".")[0]
        if frame.f_code.co_name != "__torch_function__" and package != "torch" and not asked:
            if of_user and package in ("deepspeed", "dstrain") and frame.f_code is not _THIS_CODE:
                return False
            asked = frame.f_code is not _THIS_CODE
        first = next(iter(frame.f_code.co_varnames), "")
        is_init = frame.f_code.co_name == "__init__"
        if is_init and isinstance(frame.f_locals.get(first), torch.nn.Module):
            return True
        frame = frame.f_back
    return False


_THIS_CODE = _is_in_constructor.__code__


def _parameters_in(value: Any) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters among the arguments of a function, in lists as well."""
    if isinstance(value, torch.nn.Parameter):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _parameters_in(part)
    elif isinstance(value, dict):
        yield from _parameters_in(list(value.values()))
