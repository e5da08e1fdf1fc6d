"""Checks of the number formats of parameters, some of which DeepSpeed would change.

Measured with DeepSpeed 0.19.8 on two ranks. In a 16-bit run it casts every parameter in fp16,
bf16, fp32 or fp64 to the format of the run, including those that a transformers model keeps in fp32
(``engine.py:_cast_module_mixed_precision``). In an fp32 run it leaves the formats of parameters,
but stages 1 and 2 join trained parameters into one tensor, which gives all of them the widest
format; stage 3 fails if there are two formats; master weights are in fp32 also for fp64; and
gradients in fp64 or of complex numbers cannot be reduced at stage 0. Frozen parameters may have any
format, and may be empty, but stage 3 can gather neither empty parameters nor formats that the back
end does not send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem, raise_problems
from dstrain.engine.model_checks.shared_places import share_memory
from dstrain.engine.zero import full_numel, is_partitioned

_TRAINED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_RUN = {name: dtype for dtype, name in _TRAINED.items()}
_KEPT = "data_types.keep_in_fp32_modules"
# Neither gloo nor every NCCL sends these.
_NOT_SENT = ("float8", "float4", "uint16", "uint32", "uint64")
_SHOWN = 3

_Named = Sequence[tuple[str, Any]]


def check_formats(
    module: torch.nn.Module, resolved: ResolvedConfig, *, trains: bool = True
) -> None:
    """Check that DeepSpeed would run all parameters of a model in the formats that they have.

    Args:
        module: the model, whole or partitioned.
        resolved: the config of the run.
        trains: False for a model that only runs forward.

    Raises:
        ModelError: listing parameters by the reason for which they cannot be used, with a remedy.
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
    """Make parameters contiguous in row-major order, by copying those that are not.

    DeepSpeed sends parameters as bytes (``engine.py:_broadcast_model``), which torch cannot do with
    transposed tensors, columns of a larger tensor, or weights in ``torch.channels_last``. In its
    flat tensors all parameters have row-major order.
    """
    for parameter in module.parameters():
        if parameter.layout == torch.strided and not is_in_order(parameter):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def is_in_order(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is contiguous in row-major order and its last stride is 1.

    torch calls a tensor contiguous whatever the stride of a dimension of size 1.
    """
    return tensor.dim() == 0 or (tensor.is_contiguous() and tensor.stride(-1) == 1)


def formats_remark(module: torch.nn.Module, resolved: ResolvedConfig) -> str:
    """Return a remark about parameter formats that a user may not expect; "" if there are none."""
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
    """List problems with parameters that stage 3 cannot gather."""
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
    """List a problem if embeddings have sparse gradients."""
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
    """List problems with pairs of different parameters that share memory, if one is trained.

    Sorts the parameters by address, and compares those whose address ranges overlap.

    Args:
        named: parameters with their names; a parameter with several names occurs once.
        flat: whether DeepSpeed copies all parameters into flat tensors; otherwise only those are
            copied that are not in row-major order.
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
            if trains and copied and share_memory(other, parameter):
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
    """Tell whether a parameter has elements in dense memory on this rank."""
    here = not is_partitioned(parameter) and parameter.device.type != "meta"
    return here and parameter.layout == torch.strided and parameter.numel() > 0


def _span(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


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
    """List problems with parameters that a 16-bit run would cast, losing precision."""
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
    """Return a predicate for names of parameters that transformers keeps in fp32.

    Args:
        module: the model.
        dtype: number format of the run.
    """
    from deepspeed.runtime.keep_in_fp32 import KEEP_IN_FP32_AUTO, keep_in_fp32_pattern

    pattern = keep_in_fp32_pattern(module, KEEP_IN_FP32_AUTO, dtype)
    return lambda name: pattern is not None and pattern.search(name) is not None


def _strict(module: torch.nn.Module) -> bool:
    """Tell whether the model keeps parameters in fp32 also in a bf16 run."""
    keeps = _kept_in_fp32(module, torch.bfloat16)
    return any(keeps(name) for name, _ in module.named_parameters())


def _of(named: _Named, dtype: torch.dtype) -> _Named:
    """Return the parameters that have a format."""
    return [(name, p) for name, p in named if p.dtype == dtype]


def _listed(named: _Named, *, dtype: bool = True) -> str:
    """Describe parameters by their number, their formats and the first few names."""
    names = ", ".join(name for name, _ in named[:_SHOWN])
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    formats = sorted({str(p.dtype).removeprefix("torch.") for _, p in named})
    what = f" in {', '.join(formats)}" if dtype else ""
    return f"{len(named)} parameter{'s' * (len(named) > 1)}{what} ({names}{more})"
