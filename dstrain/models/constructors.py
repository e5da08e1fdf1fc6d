"""Support for constructors of modules that read or change partitioned parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dstrain.core.errors import ModelError, Problem
from dstrain.engine import gathered, is_whole

# Functions that read values or, if their name ends with "_", change them. Conversions such as
# ``half`` are left out, since ``Module.half()`` would put the gathered copy into the parameter.
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

    DETR's backbone does so: it copies the weights of each BatchNorm into another module. The
    constructor gets a copy of the values; if it changes a copy of a whole parameter in place, the
    parameter is changed too. Other code than constructors is not served, since gathering is a
    collective and only constructors run on all ranks.
    """

    def __init__(self) -> None:
        """Prepare the mode; entering it as a context manager turns it on."""
        super().__init__()
        self._copies: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, gathering its parameters if a constructor needs their values.

        A collective of all ranks where it gathers.
        """
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
                self._copies[returned] = None  # a view of the copy, perhaps of a part
        return returned

    def _change(self, func: Any, parameter: Any, copy: torch.Tensor, *args: Any, **kw: Any) -> Any:
        """Apply an in-place function to a parameter and to the copy of it; a collective.

        Args:
            func: the function.
            parameter: the parameter; None if ``copy`` is not known to be all of one.
            copy: the tensor on which the constructor calls ``func``.
            *args: further arguments of ``func``.
            **kw: keyword arguments of ``func``.

        Raises:
            ModelError: ``parameter`` is None.
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
        """Return a copy of the result of a function, so that the gathered weight can be freed.

        Args:
            value: the result, such as a tensor or a list of tensors.
            parameter: the parameter of which it has all values; None for any other result.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self._copied(part, None) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.clone()
        self._copies[copy] = parameter
        return copy


def _is_in_constructor(*, of_user: bool) -> bool:
    """Tell whether the constructor of a module is on the call stack.

    Args:
        of_user: whether to return False if DeepSpeed or dstrain has called torch here; DeepSpeed
            does so at the end of a constructor, to partition parameters.
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
    """Yield the parameters among the arguments of a function, also those in lists and dicts."""
    if isinstance(value, torch.nn.Parameter):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _parameters_in(part)
    elif isinstance(value, dict):
        yield from _parameters_in(list(value.values()))
