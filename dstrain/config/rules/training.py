"""Rules of precision, clipping and batch sizes."""

from __future__ import annotations

from dstrain.config.rules.rule import Binding, Derivation, Derived, View, same


def _loss_scale(view: View) -> Derived | None:
    return Derived(0, "0 scales dynamically") if view.fp16 else None


def _initial_scale_power(view: View) -> Derived | None:
    return Derived(16, "first loss scale 2**16") if view.fp16 else None


def _train_batch_size(view: View) -> Derived:
    micro, accumulation = view.per_device_train_batch_size, view.gradient_accumulation_steps
    world = view.facts.world_size
    return Derived(
        micro * accumulation * world,
        f"micro-batch {micro} x accumulation {accumulation} x ranks {world}",
    )


RULES: tuple[Binding | Derivation, ...] = (
    Binding("bf16.enabled", ("bf16",), same("bf16")),
    Binding("fp16.enabled", ("fp16",), same("fp16")),
    Derivation("fp16.loss_scale", "dynamic", ("fp16",), _loss_scale),
    Derivation(
        "fp16.initial_scale_power", "DeepSpeed's first scale", ("fp16",), _initial_scale_power
    ),
    Binding("gradient_clipping", ("max_grad_norm",), same("max_grad_norm")),
    Binding(
        "train_micro_batch_size_per_gpu",
        ("per_device_train_batch_size",),
        same("per_device_train_batch_size"),
    ),
    Binding(
        "gradient_accumulation_steps",
        ("gradient_accumulation_steps",),
        same("gradient_accumulation_steps"),
    ),
    Derivation(
        "train_batch_size",
        "micro-batch x accumulation x ranks",
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        _train_batch_size,
        exact=True,
    ),
    Derivation(
        "timers.throughput.enabled",
        "off",
        (),
        lambda view: Derived(False, "DeepSpeed's timer waits for the device at every micro-batch"),
    ),
)
