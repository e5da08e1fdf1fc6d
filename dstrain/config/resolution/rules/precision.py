"""Rules of number formats: training, autocast, and sums of gradients."""

from __future__ import annotations

from typing import Any

from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, same, where_set

_AUTOCAST = "torch_autocast.enabled"
_AUTOCAST_DTYPE = "torch_autocast.dtype"
_ACCUMULATION = "data_types.grad_accum_dtype"
_SHORT = {
    "half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32",
}  # fmt: skip


def short_name(dtype: Any) -> str:
    """Return the short name of a format in any of DeepSpeed's spellings ("torch.bfloat16")."""
    text = str(dtype).lower().removeprefix("torch.")
    return _SHORT.get(text, text)


def _loss_scale(view: View) -> Derived | None:
    return Derived(0, "0 scales dynamically") if view.fp16 else None


def _initial_scale_power(view: View) -> Derived | None:
    return Derived(16, "first loss scale 2**16") if view.fp16 else None


def _autocast_dtype(view: View) -> Derived | None:
    if view.torch_autocast or view.asks(_AUTOCAST_DTYPE):
        return Derived(view.torch_autocast_dtype)
    return None


def _accumulation(view: View) -> Derived | None:
    if view.grad_accum_dtype != "auto":
        return Derived(view.grad_accum_dtype)
    count = view.gradient_accumulation_steps
    if view.bf16 and count > 1 and view.stage in (2, 3):
        return Derived("fp32", f"{count} micro-batches: a sum in bf16 would lose its last bits")
    if not view.asks(_ACCUMULATION):
        return None
    return Derived(view.precision, "the format of training")


RULES: tuple[Binding | Derivation, ...] = (
    Binding("bf16.enabled", ("bf16",), same("bf16")),
    Binding("fp16.enabled", ("fp16",), same("fp16")),
    Derivation("fp16.loss_scale", "dynamic", ("fp16",), _loss_scale),
    Derivation(
        "fp16.initial_scale_power", "DeepSpeed's first scale", ("fp16",), _initial_scale_power
    ),
    where_set(_AUTOCAST, "torch_autocast", unset=False),
    Binding(
        _AUTOCAST_DTYPE,
        ("torch_autocast_dtype",),
        _autocast_dtype,
        adopt=lambda value: (short_name(value),),
        rule="torch_autocast_dtype, where torch_autocast is on",
        optional=True,
    ),
    Binding(
        _ACCUMULATION,
        ("grad_accum_dtype",),
        _accumulation,
        adopt=lambda value: (short_name(value),),
        rule="grad_accum_dtype; auto is fp32 for bf16 with accumulation at stages 2 and 3, and "
        "the format of training elsewhere",
    ),
)
