"""Detection of losses that compute with partitioned parameters outside of the forward pass.

At ZeRO stage 3 a parameter has elements only while its own module runs; otherwise it is an empty
tensor, with which torch computes without an error. A penalty on weights is then 0, and the backward
pass fails with a message about shapes that do not occur in the user's code. A fused loss function
that is given the weight of the last layer fails in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dstrain.core.errors import Problem, TrainingError
from dstrain.engine import compat
from dstrain.engine.weight_watch.callers import is_called_by_a_library
from dstrain.engine.zero import full_numel, is_partitioned

# Functions that read properties of a tensor, not its elements.
_READS_PROPERTIES = frozenset([
    "__deepcopy__", "__dir__", "__format__", "__get__", "__hash__", "__len__", "__repr__",
    "__set__", "__str__", "backward", "data_ptr", "dim", "dim_order", "element_size", "get_device",
    "grad", "has_names", "is_complex", "is_contiguous", "is_floating_point", "is_same_size",
    "is_set_to", "is_shared", "is_signed", "is_tensor", "ndimension", "nelement", "new_empty",
    "new_full", "new_ones", "new_tensor", "new_zeros", "numel", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size", "storage",
    "storage_offset", "stride", "type", "untyped_storage",
])  # fmt: skip
# Functions that only make a copy: an error is raised if something else is computed with it.
_COPIES = frozenset([
    "bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "empty_like", "float",
    "full_like", "half", "ones_like", "rand_like", "randn_like", "to", "zeros_like",
])  # fmt: skip
# Functions that compute with their first argument only.
_READS_FIRST_ONLY = frozenset(["to", "type_as"])
# Modules of DeepSpeed and dstrain that only forward calls of other code.
_PASSING_ON = ("deepspeed.runtime.zero.linear", "dstrain.engine.zero.torch_patches")


def watching_partitioned_reads(
    engine: torch.nn.Module, module: torch.nn.Module
) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that raises an error where a loss reads partitioned parameters.

    It does nothing for a compiled model, since torch would compile the watch too.

    Args:
        engine: the DeepSpeed engine.
        module: its model.
    """
    if compat.is_compiled(module):
        return contextlib.nullcontext()
    return PartitionedReadWatch(engine, module)


class PartitionedReadWatch(TorchFunctionMode):
    """Raises an error where a loss computes with parameters that are partitioned at that moment.

    Checks every call of a function of torch outside of the forward pass of an engine, except calls
    by DeepSpeed and dstrain, which handle partitioned parameters correctly.
    """

    def __init__(self, engine: torch.nn.Module, module: torch.nn.Module) -> None:
        """Record the names of the parameters, for messages.

        Args:
            engine: the DeepSpeed engine, whose forward pass gathers the parameters that it needs.
            module: its model.
        """
        super().__init__()
        self._engine = engine
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._made: Any = WeakTensorKeyDictionary()  # copy of a partitioned parameter -> name
        self._depth = 0  # of forward passes of the engine
        self._hooks: list[Any] = []

    def __enter__(self) -> PartitionedReadWatch:
        """Begin to watch."""
        self._hooks = [
            self._engine.register_forward_pre_hook(self._begin_forward, prepend=True),
            self._engine.register_forward_hook(self._end_forward, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        super().__exit__(*error)
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, after checking its arguments.

        Raises:
            TrainingError: the function would compute with a partitioned parameter.
        """
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        read = self._read(args[:1] if name in _READS_FIRST_ONLY else (*args, *kwargs.values()))
        if read is None:
            return func(*args, **kwargs)
        is_harmless = name in _READS_PROPERTIES or name in _COPIES or _changes(name)
        if not is_harmless and not is_called_by_a_library(passing_on=_PASSING_ON):
            raise _reads_partitioned(read, name)
        returned = func(*args, **kwargs)
        is_tensor = isinstance(returned, torch.Tensor)
        if is_tensor and returned.numel() == 0 and not self._name_of(returned):
            self._made[returned] = read
        return returned

    def _begin_forward(self, *_: object) -> None:
        """Stop checking while a forward pass of the engine runs."""
        self._depth += 1

    def _end_forward(self, *_: object) -> None:
        """Check again after the outermost forward pass."""
        self._depth -= 1

    def _read(self, values: Any) -> str | None:
        """Return the name of the first partitioned parameter, or copy of one, among arguments.

        Returns:
            None where every argument has its elements.
        """
        for tensor in _tensors(values):
            if tensor.numel() == 0:
                name = self._name_of(tensor) or self._made.get(tensor)
                if name:
                    return name
        return None

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a partitioned parameter; None for any other tensor."""
        if not is_partitioned(tensor) or full_numel(tensor) == 0:
            return None
        return self._names.get(id(tensor), "a parameter")


def _reads_partitioned(parameter: str, function: str) -> TrainingError:
    """Return the error for a loss that computes with a partitioned parameter."""
    return TrainingError(
        Problem(
            f"the loss computes with {parameter} ({function}) while it is partitioned",
            "at ZeRO stage 3 a parameter has no elements outside of its own module's forward pass: "
            "the loss would be what it is without this parameter, or of the wrong shape",
            "for a penalty of weights use weight_decay; call the module, not a function with its "
            "weight; for a value that needs no gradient gather the parameters with "
            "deepspeed.zero.GatheredParameters(parameters); or set zero_stage to 2",
        )
    )


def _changes(function: str) -> bool:
    """Tell by a function's name whether it changes its argument; ``WeightWatch`` checks those."""
    return (function.endswith("_") and not function.endswith("__")) or function == "__setitem__"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments, also those inside of lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
