"""Rules of offload: devices, disks and host memory."""

from __future__ import annotations

import os
from collections.abc import Callable

from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, where_set

_ZERO = "zero_optimization"


def _offload(name: str) -> Callable[[View], Derived | None]:
    def derive(view: View) -> Derived | None:
        device = view.device_of(name)
        return None if device == "none" else Derived(device)

    return derive


def _pin_memory(name: str) -> Callable[[View], Derived | None]:
    def derive(view: View) -> Derived | None:
        if view.device_of(name) == "none":
            return None
        pinned = view.facts.device != "cpu"
        return Derived(
            pinned,
            f"device is {view.facts.device}: " + ("copied by DMA" if pinned else "no copies"),
        )

    return derive


def _nvme_path(name: str) -> Callable[[View], Derived | None]:
    def derive(view: View) -> Derived | None:
        if view.device_of(name) != "nvme" or view.nvme_path is None:
            return None
        return Derived(os.path.expanduser(view.nvme_path), f"argument nvme_path={view.nvme_path!r}")

    return derive


def _rules_of(name: str) -> tuple[Binding | Derivation, ...]:
    section = f"{_ZERO}.{name}"
    return (
        Binding(
            f"{section}.device",
            (name,),
            _offload(name),
            rule=f"{name}; none is left out",
            optional=True,
        ),
        Derivation(
            f"{section}.nvme_path",
            "nvme_path, where the device is nvme",
            ("nvme_path", name),
            _nvme_path(name),
            conflicts=True,
        ),
        Derivation(
            f"{section}.pin_memory",
            "page-locked host memory where an accelerator copies from it",
            (name,),
            _pin_memory(name),
        ),
    )


RULES: tuple[Binding | Derivation, ...] = (
    *_rules_of("offload_optimizer"),
    where_set(f"{_ZERO}.offload_optimizer.super_offload", "super_offload", unset=False),
    *_rules_of("offload_param"),
)
