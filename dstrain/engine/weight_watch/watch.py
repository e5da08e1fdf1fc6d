"""Detection of parameters that code changes in place; an error is raised for changes of no effect.

At ZeRO stage 3 a partitioned parameter has no elements, so torch changes nothing, and raises no
error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dstrain.core.errors import Problem, TrainingError
from dstrain.engine.weight_watch.callers import is_called_by_a_library
from dstrain.engine.zero import is_absent, is_partitioned

_Tensor: Any = torch.Tensor
_GET_DATA, _SET_DATA = _Tensor.data.__get__, _Tensor.data.__set__
# Functions that are named like in-place operations but change no values.
_CHANGE_NOTHING = frozenset(
    ["requires_grad_", "retain_grad_", "share_memory_", "rename_", "detach_"]
)
_IN_PLACE = ["add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow"]
_IN_PLACE += ["and", "or", "xor", "lshift", "rshift"]
_OPERATORS = frozenset(["__setitem__", *[f"__i{name}__" for name in _IN_PLACE]])
# Names of arguments that functions change in place (torch.nn.init, and others).
_CHANGED_ARGUMENTS = ("tensor", "input", "self", "out")


class WeightWatch(TorchFunctionMode):
    """Records the parameters that code in a ``watching`` block changes in place.

    Sees functions of torch that are called from Python: methods and operators of tensors,
    ``torch._foreach_*``, ``torch.nn.init``, ``load_state_dict`` and assignments to ``.data``, on a
    parameter, its ``.data``, ``.detach()`` or a view of these. The time per call does not grow with
    the number of parameters.

    Attributes:
        changed: parameters that were changed since the caller last emptied this dict, by ``id``.
        replaced: the former tensors of parameters whose ``.data`` was set, by ``id``.
    """

    def __init__(
        self, module: torch.nn.Module, *, on_change: Callable[[Any], object] = lambda _: None
    ) -> None:
        """Record the parameters of ``module``, with their names and partitions.

        Args:
            module: the model.
            on_change: called with a parameter when it is first changed.
        """
        super().__init__()
        self.changed: dict[int, Any] = {}
        self.replaced: dict[int, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._parameters: dict[int, Any] = {}
        self._aliases: Any = WeakTensorKeyDictionary()
        self._who = "the code"
        self._is_on = False
        self._on_change = on_change
        for name, parameter in module.named_parameters():
            self._names[id(parameter)] = name
            self._parameters[id(parameter)] = parameter
            if is_partitioned(parameter):
                # DeepSpeed writes changes made inside of GatheredParameters into this partition.
                share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
                self._parameters[id(share)] = parameter

    @contextlib.contextmanager
    def watching(self, who: str) -> Iterator[None]:
        """Watch the code in the block; does nothing inside of another such block.

        Args:
            who: a name for that code, such as "a callback", for messages.
        """
        if self._is_on:
            yield
            return
        self._who, self._is_on = who, True
        try:
            with self:
                yield
        finally:
            self._is_on = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and record the parameters that it changes.

        Raises:
            TrainingError: the function would change a partitioned parameter.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == _GET_DATA or name == "detach":
            returned = func(*args, **kwargs)
            if (parameter := self._origin(args[0])) is not None:
                self._aliases[returned] = parameter
            return returned
        touched = [self._origin(t) for t in _changed_by(func, name, args, kwargs)]
        changed = [parameter for parameter in touched if parameter is not None]
        if func == _SET_DATA and changed and is_partitioned(changed[0]):
            # DeepSpeed does so to gather a parameter, and to a partition that it reads from a disk.
            is_change = changed[0] is args[0] and not is_called_by_a_library()
            changed = changed if is_change else []
        absent = [p for p in changed if is_absent(p)] or self._about_to_be_filled(args)
        if absent and not is_called_by_a_library():
            raise self._no_effect(absent[0], name)
        if func == _SET_DATA and changed and not is_partitioned(changed[0]):
            self.replaced.setdefault(id(changed[0]), changed[0].data)
        returned = func(*args, **kwargs)
        for parameter in changed:
            if id(parameter) not in self.changed:
                self.changed[id(parameter)] = parameter
                self._on_change(parameter)
        return returned

    def _origin(self, tensor: Any) -> Any:
        """Return the parameter whose values a tensor has, or None."""
        if not isinstance(tensor, torch.Tensor):
            return None
        for candidate in (tensor, tensor._base):
            if candidate is None:
                continue
            found = self._parameters.get(id(candidate))
            found = self._aliases.get(candidate) if found is None else found
            if found is not None:
                return found
        return None

    def _about_to_be_filled(self, args: Any) -> list[Any]:
        """Return the partitioned parameter that torch is about to initialise or load, in a list.

        ``torch.nn.init`` and ``load_state_dict`` read its shape first, and would raise an error
        about the empty shape that does not name the cause. The list is empty for any other call.
        """
        caller = sys._getframe(2)
        fills = caller.f_code.co_name == "_load_from_state_dict"
        if not fills and caller.f_globals.get("__name__") != "torch.nn.init":
            return []
        parameter = self._origin(args[0]) if args else None
        return [parameter] if parameter is not None and is_absent(parameter) else []

    def _no_effect(self, parameter: Any, function: str) -> TrainingError:
        """Return the error for a change of a partitioned parameter, which would have no effect."""
        name = self._names.get(id(parameter), "a parameter")
        return TrainingError(
            Problem(
                f"{self._who} changes {name} in place ({function}) while it is partitioned",
                "at ZeRO stage 3 a parameter has no elements outside of its own module's forward "
                "pass, so the change would be lost",
                "change it on all ranks inside of `with deepspeed.zero.GatheredParameters("
                "parameters, modifier_rank=0):`, keep such an average in buffers, or set "
                "zero_stage to 2",
            )
        )


def _changed_by(
    func: Any, name: str, args: Any, kwargs: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    """Yield the tensors that a call changes in place."""
    yield from _tensors(kwargs.get("out"))
    changes = name.endswith("_") and not name.endswith("__") and name not in _CHANGE_NOTHING
    sets_data = func == _SET_DATA and args[1].numel() > 0  # model.to() sets no partitioned data
    if not changes and name not in _OPERATORS and not sets_data:
        return
    if args:
        yield from _tensors(args[0])
        return
    for key in _CHANGED_ARGUMENTS:
        yield from _tensors(kwargs.get(key))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield an argument that is a tensor, or the tensors in a list (``torch._foreach_*``)."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (tensor for tensor in value if isinstance(tensor, torch.Tensor))
