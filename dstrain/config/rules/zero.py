"""Rules of the ZeRO stage, and of how stage 3 walks the model."""

from __future__ import annotations

from typing import Any

from dstrain.config import schema
from dstrain.config.rules.rule import Binding, Derivation, Derived, View, where_set

_LEAVES = "zero_optimization.leaf_module.classes"
_SUB_GROUP = "zero_optimization.sub_group_size"


def _stage(view: View) -> Derived:
    if view.zero_stage != "auto":
        return Derived(int(view.zero_stage))
    needs = [reason for reason, needed in _stage_three(view).items() if needed]
    if needs:
        return Derived(3, f"{' and '.join(needs)} needs stage 3")
    return Derived(2, "zero_stage='auto' takes stage 2")


def _stage_three(view: View) -> dict[str, bool]:
    """Arguments that choose what only stage 3 has, and whether they were set."""
    flags = (
        "super_offload",
        "quantized_weights",
        "quantized_nontrainable_weights",
        "quantized_gradients",
    )
    return {
        f"offload_param={view.offload_param!r}": view.device_of("offload_param") != "none",
        "offload_optimizer='nvme'": view.device_of("offload_optimizer") == "nvme",
        f"hpz_partition_size={view.hpz_partition_size}": view.hpz_partition_size not in (None, 1),
        **{f"{name}=True": bool(getattr(view, name)) for name in flags},
    }


def _leaf_classes(view: View) -> Derived | None:
    if view.leaf_modules is not None:
        return Derived(list(view.leaf_modules))
    found = view.facts.expert_blocks
    if view.stage < 3 or not found:
        return None
    usual = schema.default_of(_LEAVES)
    return Derived(
        [*usual, *(name for name in found if name not in usual)],
        f"DeepSpeed's own list and {', '.join(found)}: experts that are modules of their own, "
        "which not every rank runs",
    )


def _sub_group(view: View) -> Derived | None:
    if view.stage < 3:
        return None
    return Derived(schema.default_of(_SUB_GROUP), "DeepSpeed's default")


def _names(value: Any) -> tuple[Any, ...]:
    return ([value] if isinstance(value, str) else list(value),)


RULES: tuple[Binding | Derivation, ...] = (
    Binding(
        "zero_optimization.stage",
        ("zero_stage",),
        _stage,
        adopt=lambda value: (str(value),),
        rule="zero_stage; where that is auto 3 if another argument needs it, else 2",
    ),
    where_set(
        _SUB_GROUP,
        "sub_group_size",
        otherwise=_sub_group,
        rule='sub_group_size; "auto" is DeepSpeed\'s 1e9 at stage 3',
    ),
    Binding(
        _LEAVES,
        ("leaf_modules",),
        _leaf_classes,
        adopt=_names,
        rule="leaf_modules; without it, at stage 3, DeepSpeed's list and blocks of the model whose "
        "experts are modules of their own",
    ),
)
