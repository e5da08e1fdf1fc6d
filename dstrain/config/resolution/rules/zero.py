"""Rules of the ZeRO stage, and of sub-groups and leaf modules at stage 3."""

from __future__ import annotations

from typing import Any

from dstrain.config import schema
from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, where_set

_LEAVES = "zero_optimization.leaf_module.classes"
_SUB_GROUP = "zero_optimization.sub_group_size"


def _stage(view: View) -> Derived:
    return Derived(int(view.zero_stage))  # "auto" is decided before the rules run


def _leaf_classes(view: View) -> Derived | None:
    """Return the user's leaf modules, or DeepSpeed's and the model's blocks of experts."""
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
        rule="zero_stage; auto is the fastest that fits by the memory plan, 3 where an argument "
        "needs it, and 2 where model or machine are not known",
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
    Derivation(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        '"auto" is false: models are saved whole without it',
        (),
        lambda view: (
            Derived(False, "dstrain saves whole models itself") if view.stage == 3 else None
        ),
        only_auto=True,
    ),
)
