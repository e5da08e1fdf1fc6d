"""Rules of the ZeRO stage and of offload."""

from __future__ import annotations

from collections.abc import Callable

from dstrain.config.rules.rule import Binding, Derivation, Derived, View


def _stage(view: View) -> Derived:
    return Derived(int(view.zero_stage))  # "auto" is decided before the rules run


def _offload(name: str) -> Callable[[View], Derived | None]:
    def derive(view: View) -> Derived | None:
        device = getattr(view, name)
        return None if device == "none" else Derived(device)

    return derive


def _pin_memory(name: str) -> Callable[[View], Derived | None]:
    def derive(view: View) -> Derived | None:
        if getattr(view, name) == "none":
            return None
        pinned = view.facts.device != "cpu"
        return Derived(
            pinned,
            f"device is {view.facts.device}: " + ("copied by DMA" if pinned else "no copies"),
        )

    return derive


RULES: tuple[Binding | Derivation, ...] = (
    Binding(
        "zero_optimization.stage",
        ("zero_stage",),
        _stage,
        adopt=lambda value: (str(value),),
    ),
    Binding(
        "zero_optimization.offload_optimizer.device",
        ("offload_optimizer",),
        _offload("offload_optimizer"),
    ),
    Derivation(
        "zero_optimization.offload_optimizer.pin_memory",
        "page-locked host memory where an accelerator copies from it",
        ("offload_optimizer",),
        _pin_memory("offload_optimizer"),
    ),
    Binding(
        "zero_optimization.offload_param.device", ("offload_param",), _offload("offload_param")
    ),
    Derivation(
        "zero_optimization.offload_param.pin_memory",
        "page-locked host memory where an accelerator copies from it",
        ("offload_param",),
        _pin_memory("offload_param"),
    ),
)
