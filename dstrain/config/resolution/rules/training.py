"""Rules of clipping, batch sizes and checkpointed activations."""

from __future__ import annotations

from dstrain.config.resolution.batch import global_batch
from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, same, where_set


def _train_batch_size(view: View) -> Derived:
    micro, accumulation = view.per_device_train_batch_size, view.gradient_accumulation_steps
    world = view.facts.world_size
    return Derived(
        global_batch(micro, accumulation, world),
        f"micro-batch {micro} x accumulation {accumulation} x ranks {world}",
    )


RULES: tuple[Binding | Derivation, ...] = (
    where_set("activation_checkpointing.cpu_checkpointing", "cpu_checkpointing", unset=False),
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
