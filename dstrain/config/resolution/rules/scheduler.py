"""Rules of DeepSpeed's schedules, which run only if the user's config has one."""

from __future__ import annotations

import math

from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, same

# DeepSpeed's schedules, in lower case, and the lr_scheduler_type with the same curve.
SCHEDULES = {
    "warmuplr": "constant_with_warmup",
    "warmupdecaylr": "linear",
    "warmupcosinelr": "cosine",
}


def _scheduler_total(view: View) -> Derived | None:
    steps = view.facts.num_training_steps
    if steps is None:
        return None
    return Derived(steps, f"the run has {steps} optimizer steps")


def _scheduler_warmup(view: View) -> Derived | None:
    """Return the warm-up steps of the arguments, at least 1."""
    steps = view.facts.num_training_steps
    if steps is None:
        return None
    count = view.warmup_steps if view.warmup_steps >= 1 else None
    if count is None:
        count = math.ceil(steps * (view.warmup_steps or view.warmup_ratio))
    return Derived(max(1, int(count)), f"warm-up of {int(count)} steps, at least 1 for DeepSpeed")


RULES: tuple[Binding | Derivation, ...] = (
    Binding(
        "scheduler.params.warmup_max_lr",
        ("learning_rate",),
        same("learning_rate"),
        when_present=True,
    ),
    Derivation(
        "scheduler.params.warmup_min_lr", "0", (), lambda view: Derived(0, "0"), only_auto=True
    ),
    Derivation(
        "scheduler.params.total_num_steps",
        "optimizer steps of the run",
        ("max_steps", "num_train_epochs"),
        _scheduler_total,
        only_auto=True,
    ),
    Derivation(
        "scheduler.params.warmup_num_steps",
        "warm-up steps, at least 1",
        ("warmup_steps", "warmup_ratio"),
        _scheduler_warmup,
        only_auto=True,
        conflicts=True,
    ),
)
