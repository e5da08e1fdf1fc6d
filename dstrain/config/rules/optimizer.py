"""Rules of the optimizer: which implementation runs, with which parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dstrain.config.rules.rule import Binding, Derivation, Derived, View, same

# argument value -> (DeepSpeed optimizer type, extra parameters without offload)
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_torch": ("AdamW", {"torch_adam": True}),
    "adamw_torch_fused": ("AdamW", {"torch_adam": True, "fused": True}),
    "adamw_apex_fused": ("AdamW", {}),
    "sgd": ("SGD", {}),
    "adagrad": ("Adagrad", {}),
}


def _optimizer_type(view: View) -> Derived:
    kind, _ = OPTIMIZERS[view.optim]
    if view.offloads_optimizer and kind == "AdamW":
        return Derived(kind, f"optim={view.optim!r} with offload runs DeepSpeed's CPU Adam")
    return Derived(kind, f"optim={view.optim!r}")


def _optimizer_names(kind: Any) -> tuple[Any, ...]:
    """The argument that stands for a type in the config; unknown types stay the config's."""
    names = {"adamw": "adamw_torch", "adam": "adamw_torch", "sgd": "sgd", "adagrad": "adagrad"}
    return (names.get(str(kind).lower()),)


def _is_adam(view: View) -> bool:
    return str(view.config.get("optimizer", {}).get("type", "")).lower() in ("adam", "adamw")


def _for_adam(value: Callable[[View], Any]) -> Callable[[View], Derived | None]:
    return lambda view: Derived(value(view)) if _is_adam(view) else None


def _torch_adam(view: View) -> Derived | None:
    if not _is_adam(view):
        return None
    if view.offloads_optimizer:
        return Derived(False, "offloaded: DeepSpeed's CPU Adam")
    wanted = OPTIMIZERS.get(view.optim, ("", {}))[1].get("torch_adam", False)
    return Derived(wanted, f"optim={view.optim!r}")


def _fused(view: View) -> Derived | None:
    if not _is_adam(view) or view.offloads_optimizer:
        return None
    if not view.config["optimizer"].get("params", {}).get("torch_adam"):
        return None  # DeepSpeed's kernel knows no such parameter
    fused = OPTIMIZERS.get(view.optim, ("", {}))[1].get("fused")
    return Derived(True, f"optim={view.optim!r}") if fused else None


def _allow_untested(view: View) -> Derived | None:
    if view.facts.own_optimizer:
        return Derived(True, "your own optimizer") if view.stage else None
    kind = str(view.config.get("optimizer", {}).get("type", ""))
    if not kind or _is_adam(view) or view.stage == 0:
        return None
    return Derived(True, f"DeepSpeed asks for it before ZeRO runs {kind}")


def _force_cpu_optimizer(view: View) -> Derived | None:
    if not (view.facts.own_optimizer and view.offloads_optimizer):
        return None
    return Derived(False, "your own optimizer runs as given, on the host")


RULES: tuple[Binding | Derivation, ...] = (
    Binding("optimizer.type", ("optim",), _optimizer_type, adopt=_optimizer_names),
    Binding("optimizer.params.lr", ("learning_rate",), same("learning_rate")),
    Binding(
        "optimizer.params.betas",
        ("adam_beta1", "adam_beta2"),
        _for_adam(lambda view: [view.adam_beta1, view.adam_beta2]),
        adopt=lambda value: tuple(value),
    ),
    Binding("optimizer.params.eps", ("adam_epsilon",), _for_adam(lambda view: view.adam_epsilon)),
    Binding("optimizer.params.weight_decay", ("weight_decay",), same("weight_decay")),
    Derivation(
        "optimizer.params.torch_adam",
        "torch's AdamW unless the optimizer is offloaded or a DeepSpeed kernel was asked for",
        ("optim", "offload_optimizer"),
        _torch_adam,
    ),
    Derivation("optimizer.params.fused", "torch's fused kernel when asked for", ("optim",), _fused),
    Derivation(
        "zero_force_ds_cpu_optimizer",
        "false for a user's own optimizer under offload",
        ("offload_optimizer",),
        _force_cpu_optimizer,
    ),
    Derivation(
        "zero_allow_untested_optimizer",
        "true for optimizers that DeepSpeed has no ZeRO test of",
        ("optim",),
        _allow_untested,
    ),
)
