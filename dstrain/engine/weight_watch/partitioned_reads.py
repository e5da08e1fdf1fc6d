"""Parameters that a loss computes with outside of the model's forward pass, in parts as they are.

At ZeRO stage 3 a parameter has no elements but while its own module runs. Torch computes with such
a tensor without a word: a penalty of weights is 0, and its gradient ends the backward pass with
shapes that nobody wrote. A fused loss that is given the weight of the last layer cannot know the
reason either.
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

# They ask what a tensor is, and not for its elements.
_ASKS = frozenset([
    "__deepcopy__", "__dir__", "__format__", "__get__", "__hash__", "__len__", "__repr__",
    "__set__", "__str__", "backward", "data_ptr", "dim", "dim_order", "element_size", "get_device",
    "grad", "has_names", "is_complex", "is_contiguous", "is_floating_point", "is_same_size",
    "is_set_to", "is_shared", "is_signed", "is_tensor", "ndimension", "nelement", "new_empty",
    "new_full", "new_ones", "new_tensor", "new_zeros", "numel", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size", "storage",
    "storage_offset", "stride", "type", "untyped_storage",
])  # fmt: skip
# They make another tensor of the same, which somebody may compute with later or not.
_MAKES = frozenset([
    "bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "empty_like", "float",
    "full_like", "half", "ones_like", "rand_like", "randn_like", "to", "zeros_like",
])  # fmt: skip
# Of their arguments only the first is computed with.
_TAKES_ONE = frozenset(["to", "type_as"])
# They pass on what others compute with.
_PASS_ON = ("deepspeed.runtime.zero.linear", "dstrain.engine.zero.torch_patches")


def watching_partitioned_reads(
    engine: torch.nn.Module, module: torch.nn.Module
) -> contextlib.AbstractContextManager[Any]:
    """Watch what runs inside, unless the model is compiled, where it would be compiled too.

    Args:
        engine: DeepSpeed's.
        module: the model inside of it.
    """
    if compat.is_compiled(module):
        return contextlib.nullcontext()
    return PartitionedReadWatch(engine, module)


class PartitionedReadWatch(TorchFunctionMode):
    """Ends the computation of a loss that uses parameters which are in parts at that moment.

    It looks at every call of a torch function outside of the forward pass of an engine. Calls of
    DeepSpeed and of this package, which know about parts, are none of its business.
    """

    def __init__(self, engine: torch.nn.Module, module: torch.nn.Module) -> None:
        """Note the names of parameters.

        Args:
            engine: DeepSpeed's, whose forward pass gathers what it needs.
            module: the model inside of it.
        """
        super().__init__()
        self._engine = engine
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._made: Any = WeakTensorKeyDictionary()  # of a parameter in parts: its name
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
        """Watch no more."""
        super().__exit__(*error)
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function.

        Raises:
            TrainingError: it would compute with a parameter that is in parts.
        """
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        read = self._read(args[:1] if name in _TAKES_ONE else (*args, *kwargs.values()))
        if read is None:
            return func(*args, **kwargs)
        is_harmless = name in _ASKS or name in _MAKES or _changes(name)
        if not is_harmless and not is_called_by_a_library(passing_on=_PASS_ON):
            raise _in_parts(read, name)
        returned = func(*args, **kwargs)
        is_tensor = isinstance(returned, torch.Tensor)
        if is_tensor and returned.numel() == 0 and not self._name_of(returned):
            self._made[returned] = read
        return returned

    def _begin_forward(self, *_: object) -> None:
        self._depth += 1

    def _end_forward(self, *_: object) -> None:
        self._depth -= 1

    def _read(self, values: Any) -> str | None:
        """Return the name of the first parameter among arguments of which nothing is here."""
        for tensor in _tensors(values):
            if tensor.numel() == 0:
                name = self._name_of(tensor) or self._made.get(tensor)
                if name:
                    return name
        return None

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        if not is_partitioned(tensor) or full_numel(tensor) == 0:
            return None
        return self._names.get(id(tensor), "a parameter")


def _in_parts(parameter: str, function: str) -> TrainingError:
    return TrainingError(
        Problem(
            f"the loss computes with {parameter} ({function}) while it is in parts",
            "at ZeRO stage 3 a parameter has no elements outside of its own module's forward pass: "
            "the loss would be what it is without this parameter, or of the wrong shape",
            "for a penalty of weights use weight_decay; call the module, not a function with its "
            "weight; for a value that needs no gradient gather the parameters with "
            "deepspeed.zero.GatheredParameters(parameters); or set zero_stage to 2",
        )
    )


def _changes(function: str) -> bool:
    """Return whether a function changes its first argument, by its name: not seen to here."""
    return (function.endswith("_") and not function.endswith("__")) or function == "__setitem__"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments, and in the lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
