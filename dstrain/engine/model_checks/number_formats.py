"""Checks of the number formats of parameters: DeepSpeed would train some in another format.

Measured with DeepSpeed 0.19.8 on two ranks: in a 16-bit run it casts every parameter in fp16,
bf16, fp32 or fp64 to the format of the run, including those that a transformers model keeps in fp32
(``engine.py:_cast_module_mixed_precision``). In an fp32 run it leaves parameters as they are, but
stages 1 and 2 join trained ones into one tensor, which gives all of them the widest format; stage 3
fails on two formats; master weights are fp32 also for fp64; and gradients of fp64 or complex
numbers cannot be reduced at stage 0. Frozen parameters may have any format, and no elements, but
stage 3 cannot gather ones without elements, nor formats that the back end does not send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem, raise_problems
from dstrain.engine.zero import full_numel, is_partitioned

_TRAINED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_RUN = {name: dtype for dtype, name in _TRAINED.items()}
_KEPT = "data_types.keep_in_fp32_modules"
# Neither gloo nor every NCCL sends these.
_NOT_SENT = ("float8", "float4", "uint16", "uint32", "uint64")
_SHOWN = 3
# Places in memory that are marked at once, a byte for each, to find out whether tensors share some.
_MARKED = 2**22

_Named = Sequence[tuple[str, Any]]


def check_formats(
    module: torch.nn.Module, resolved: ResolvedConfig, *, trains: bool = True
) -> None:
    """Refuse parameters that would be trained in another format than they have in the model.

    Args:
        module: the model, whole or partitioned.
        resolved: the config of the run.
        trains: False where it only runs forward.

    Raises:
        ModelError: listing them by reason, with what to do.
    """
    named = list(module.named_parameters())
    problems = _partition_problems(named) if resolved.stage == 3 else []
    if trains:
        problems += _sparse_problems(module)
        flat = resolved.stage > 0 or resolved.precision != "fp32"
        problems += _memory_problems(named, flat=flat)
    if resolved.precision == "fp32":
        problems += _mixed_problems(named, resolved) if trains else []
    else:
        problems += _cast_problems(module, named, resolved)
    raise_problems(problems, error=ModelError, title="these parameters cannot be used as they are")


def make_contiguous(module: torch.nn.Module) -> None:
    """Copy parameters so that elements lie in memory in the order of the dimensions.

    DeepSpeed sends parameters as bytes (``engine.py:_broadcast_model``), which torch cannot do with
    transposed ones, columns of a larger tensor, or weights in ``torch.channels_last``. Its flat
    tensors have this order in any case.
    """
    for parameter in module.parameters():
        if parameter.layout == torch.strided and not is_in_order(parameter):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def is_in_order(tensor: torch.Tensor) -> bool:
    """Tell whether elements lie in memory in the order of the dimensions.

    A dimension of size 1 may have any stride, and torch calls the whole contiguous.
    """
    return tensor.dim() == 0 or (tensor.is_contiguous() and tensor.stride(-1) == 1)


def formats_remark(module: torch.nn.Module, resolved: ResolvedConfig) -> str:
    """Describe formats that a run can use but a user may not expect; "" where there are none."""
    run = resolved.precision
    dtypes = [p.dtype for p in module.parameters() if p.dtype in _TRAINED]
    counts = {name: dtypes.count(dtype) for dtype, name in _TRAINED.items()}
    if run == "fp32":
        trained = {p.dtype for p in module.parameters() if p.requires_grad}
        if not trained or torch.float32 in trained:
            return ""
        name = _TRAINED.get(trained.pop(), "")
        weights = "weights themselves" if resolved.stage == 0 else "master weights in fp32"
        return (
            f"the model is in {name} and neither bf16 nor fp16 is set: it computes in {name}, and "
            f"the optimizer updates {weights}. Load it in fp32, or set {name}=True"
        )
    if counts[run] and counts["fp32"] and not has_adapters(module):
        return (
            f"{counts['fp32']} parameters of the model are in fp32 and {counts[run]} in {run}: all "
            f"compute in {run}, with master weights in fp32"
        )
    return ""


def _partition_problems(named: _Named) -> list[Problem]:
    import torch.distributed as dist

    problems = []
    empty = [(n, p) for n, p in named if full_numel(p) == 0]
    if empty:
        problems.append(
            Problem(
                f"{_listed(empty)} without elements at ZeRO stage 3",
                "DeepSpeed never finds them gathered",
                "set zero_stage to 2 or less, or remove them from the model",
            )
        )
    unsent = [(n, p) for n, p in named if str(p.dtype).removeprefix("torch.").startswith(_NOT_SENT)]
    if unsent and dist.is_initialized() and dist.get_world_size() > 1:
        problems.append(
            Problem(
                f"{_listed(unsent)} at ZeRO stage 3",
                "ranks cannot send each other their parts in this format",
                "set zero_stage to 2 or less",
            )
        )
    return problems


def _sparse_problems(module: torch.nn.Module) -> list[Problem]:
    tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    sparse = [
        name
        for name, part in module.named_modules()
        if isinstance(part, tables) and part.sparse and part.weight.requires_grad
    ]
    if not sparse:
        return []
    shown = ", ".join(sparse[:_SHOWN]) + (
        f" and {len(sparse) - _SHOWN} more" * (len(sparse) > _SHOWN)
    )
    return [
        Problem(
            f"{shown}: sparse=True, so that gradients are sparse tensors",
            "DeepSpeed joins gradients into flat tensors, which are dense",
            "leave sparse=True out; the values that are trained are the same",
        )
    ]


def _memory_problems(named: _Named, *, flat: bool) -> list[Problem]:
    """List pairs of parameters that share memory, of which at least one is trained.

    A parameter that is registered under several names is one parameter, and no problem. Sorts the
    parameters, and compares those piece by piece whose memory interleaves.

    Args:
        named: parameters by name.
        flat: whether DeepSpeed copies all parameters, not only those of another order.
    """
    spans = sorted(
        ((p.data_ptr(), p.data_ptr() + _span(p), n, p) for n, p in named if _has_memory(p)),
        key=lambda span: span[:2],
    )
    problems, open_spans = [], spans[:0]
    for span in spans:
        start, _, name, parameter = span
        open_spans = [other for other in open_spans if other[1] > start]
        for _, _, other_name, other in open_spans:
            trains = parameter.requires_grad or other.requires_grad
            copied = flat or not (is_in_order(parameter) and is_in_order(other))
            if trains and copied and _overlap(other, parameter):
                problems.append(
                    Problem(
                        f"{other_name} and {name} share memory, but are two parameters",
                        "DeepSpeed copies each into memory of its own, so that a change of one "
                        "would no longer be a change of the other",
                        "tie them by registering one parameter twice, or clone one of them",
                    )
                )
        if len(problems) >= _SHOWN:
            break
        open_spans.append(span)
    return problems


def _has_memory(parameter: torch.Tensor) -> bool:
    here = not is_partitioned(parameter) and parameter.device.type != "meta"
    return here and parameter.layout == torch.strided and parameter.numel() > 0


def _span(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


@dataclass(frozen=True)
class _Lattice:
    """The places in memory of a tensor's elements.

    Attributes:
        start: place of the first element.
        dims: size and stride of each dimension with more than one place.
    """

    start: int
    dims: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, start: int, *, unit: int) -> _Lattice:
        """Take a tensor's places, in units of so many bytes, of which an element may have more."""
        units = tensor.element_size() // unit
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        dims = [(size, stride * units) for size, stride in steps]
        return cls(start, tuple((n, step) for n, step in [*dims, (units, 1)] if n > 1 and step))

    @property
    def span(self) -> int:
        """Count the places from the first element to the last."""
        return sum((size - 1) * stride for size, stride in self.dims) + 1

    def halves(self) -> tuple[_Lattice, _Lattice]:
        """Cut the dimension with the largest stride in two."""
        widest = max(self.dims, key=lambda dim: dim[1])
        size, stride = widest
        at = self.dims.index(widest)
        first, second = (
            tuple(
                (n, step)
                for n, step in (*self.dims[:at], (part, stride), *self.dims[at + 1 :])
                if n > 1
            )
            for part in (size // 2, size - size // 2)
        )
        return _Lattice(self.start, first), _Lattice(self.start + size // 2 * stride, second)

    def mark(self, marks: torch.Tensor, start: int) -> torch.Tensor:
        """Return the view of ``marks``, which begin at ``start``, that these places are."""
        sizes = [size for size, _ in self.dims]
        return marks.as_strided(sizes, [stride for _, stride in self.dims], self.start - start)


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether two tensors, of which the first begins first, have an element in common."""
    distance = second.data_ptr() - first.data_ptr()
    unit = math.gcd(first.element_size(), second.element_size(), distance)
    return _meet(_Lattice.of(first, 0, unit=unit), _Lattice.of(second, distance // unit, unit=unit))


def _meet(first: _Lattice, second: _Lattice) -> bool:
    """Tell whether two lattices have a place in common.

    Those that interleave are cut into pieces whose places are marked: the time grows with the
    places between their ends, the memory does not.
    """
    pairs = [(first, second)]
    while pairs:
        a, b = pairs.pop()
        if a.start + a.span <= b.start or b.start + b.span <= a.start:
            continue
        common = math.gcd(*(stride for _, stride in (*a.dims, *b.dims)))
        if common > 1 and (b.start - a.start) % common:
            continue  # as the even and the odd elements
        wider, other = (a, b) if a.span >= b.span else (b, a)
        if wider.span > _MARKED:
            pairs += [(half, other) for half in wider.halves()]
            continue
        start = min(a.start, b.start)
        marks = torch.zeros(max(a.start + a.span, b.start + b.span) - start, dtype=torch.bool)
        a.mark(marks, start).fill_(True)
        if b.mark(marks, start).any():
            return True
    return False


def _mixed_problems(named: _Named, resolved: ResolvedConfig) -> list[Problem]:
    """List problems with the formats of trained parameters in an fp32 run."""
    from deepspeed.accelerator import get_accelerator

    stage = resolved.stage
    trained = [(name, p) for name, p in named if p.requires_grad]
    lost = [(name, p) for name, p in trained if p.dtype not in _TRAINED]
    problems = []
    if lost:
        problems.append(
            Problem(
                f"{_listed(lost)} to be trained",
                "DeepSpeed keeps master weights in fp32 at stages 1 to 3, and cannot reduce such "
                "gradients at stage 0",
                "call float() of the model, or freeze them with requires_grad_(False)",
            )
        )
    formats = sorted({_TRAINED[p.dtype] for _, p in trained if p.dtype in _TRAINED})
    if stage > 0 and len(formats) > 1:
        problems.append(
            Problem(
                "; ".join(_listed(_of(trained, _RUN[name])) for name in formats)
                + f": all to be trained, at ZeRO stage {stage}",
                "DeepSpeed joins trained parameters into one tensor, of one format",
                "give them one format (model.float()), freeze those of the other, set bf16 or fp16 "
                "to train all of them so, or set zero_stage to 0",
            )
        )
    supported = get_accelerator().supported_dtypes()
    unreduced = [(n, p) for n, p in trained if p.dtype in _TRAINED and p.dtype not in supported]
    if stage == 0 and unreduced:
        problems.append(
            Problem(
                f"{_listed(unreduced)} to be trained on {get_accelerator().device_name()}",
                "gradients in this format are not reduced there",
                "call float() of the model",
            )
        )
    return problems


def _cast_problems(
    module: torch.nn.Module, named: _Named, resolved: ResolvedConfig
) -> list[Problem]:
    """List parameters of a 16-bit run that must not lose their format."""
    run = resolved.precision
    problems = []
    wide = [(name, p) for name, p in named if p.dtype == torch.float64]
    if wide:
        problems.append(
            Problem(
                f"{_listed(wide)} with {run}=True",
                f"DeepSpeed casts every parameter to {run}, frozen ones too",
                f"leave {run} out, or call float() of the model if they may be rounded",
            )
        )
    lost = [
        (name, p)
        for name, p in named
        if p.requires_grad and not (p.dtype in _TRAINED or p.dtype == torch.float64)
    ]
    if lost:
        problems.append(
            Problem(
                f"{_listed(lost)} to be trained",
                "DeepSpeed keeps master weights in fp32",
                "freeze them with requires_grad_(False)",
            )
        )
    if isinstance(resolved.values.get(_KEPT, "auto"), str):
        keeps = _kept_in_fp32(module, _RUN[run])
        kept = [(n, p) for n, p in named if p.is_floating_point() and keeps(n)]
        if kept:
            problems.append(
                Problem(
                    f"{type(module).__name__} keeps {_listed(kept, dtype=False)} in fp32, with "
                    f"{run}=True",
                    f"DeepSpeed would compute with them in {run}; only their master weights are in "
                    "fp32",
                    f"leave {run} out (with torch_autocast=True products are still in 16 bits)"
                    + (", set bf16 instead" if run == "fp16" and not _strict(module) else "")
                    + '; or say that it may: {"data_types": {"keep_in_fp32_modules": []}} in the '
                    "DeepSpeed config",
                )
            )
    return problems


def _kept_in_fp32(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return a function that tells whether transformers keeps a name in fp32 in a ``dtype`` run."""
    from deepspeed.runtime.keep_in_fp32 import KEEP_IN_FP32_AUTO, keep_in_fp32_pattern

    pattern = keep_in_fp32_pattern(module, KEEP_IN_FP32_AUTO, dtype)
    return lambda name: pattern is not None and pattern.search(name) is not None


def _strict(module: torch.nn.Module) -> bool:
    """Tell whether the model keeps parameters in fp32 in a bf16 run too."""
    keeps = _kept_in_fp32(module, torch.bfloat16)
    return any(keeps(name) for name, _ in module.named_parameters())


def _of(named: _Named, dtype: torch.dtype) -> _Named:
    return [(name, p) for name, p in named if p.dtype == dtype]


def _listed(named: _Named, *, dtype: bool = True) -> str:
    """Return the number of parameters, their formats and the first few names, as text."""
    names = ", ".join(name for name, _ in named[:_SHOWN])
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    formats = sorted({str(p.dtype).removeprefix("torch.") for _, p in named})
    what = f" in {', '.join(formats)}" if dtype else ""
    return f"{len(named)} parameter{'s' * (len(named) > 1)}{what} ({names}{more})"
