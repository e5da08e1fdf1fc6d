"""The rules: each owns named keys of the DeepSpeed config and says where their values come from.

Two kinds. A ``Binding`` ties one key to arguments that mean the same thing: a value that the user
wrote in the config is adopted by arguments left at their default. A ``Derivation`` computes a key
from arguments and facts. Rules see the arguments through ``View``, after adoption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config.facts import Facts, ModelFacts

# DeepSpeed's own default bucket (5e8 elements) is allocated whole, whatever the model's size; at
# 5e7 elements (100 MB in 16 bits) a bucket is already far above the size at which links saturate.
BUCKET_ELEMENTS = 50_000_000
SMALL_PARAMETER_ELEMENTS = 10_000
KEPT_PARAMETER_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class View:
    """What a rule may read: arguments after adoption, facts, and the config as filled so far."""

    arguments: Mapping[str, Any]
    facts: Facts
    config: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        """An argument by name."""
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def stage(self) -> int:
        """ZeRO stage after resolution."""
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer runs on the host."""
        return self.offload_optimizer != "none"


@dataclass(frozen=True)
class Derived:
    """A value and how it came about.

    ``how`` is the formula with its numbers; empty when the value is an argument's own.
    """

    value: Any
    how: str = ""


@dataclass(frozen=True)
class Binding:
    """A key that means the same as one or more arguments.

    Attributes:
        key: dotted path.
        arguments: names of the arguments.
        adopt: argument values that a config value stands for, in the order of ``arguments``.
        derive: the key's value from arguments; None leaves the key out of the config.
        when_present: fill it only where the user's config has the section or says "auto".
    """

    key: str
    arguments: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    adopt: Callable[[Any], tuple[Any, ...]] = lambda value: (value,)
    when_present: bool = False


@dataclass(frozen=True)
class Derivation:
    """A key computed from arguments and facts.

    Attributes:
        key: dotted path.
        rule: the rule in words, for the generated table.
        reads: argument names the rule reads.
        derive: value and formula, or None to leave the key out.
        only_auto: fill it only where the user's config says "auto" or has its section.
        exact: a different value of the user's is a conflict, not a choice.
        conflicts: it is one where an argument that the rule reads was changed.
    """

    key: str
    rule: str
    reads: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    only_auto: bool = False
    exact: bool = False
    conflicts: bool = False


def _same(name: str) -> Callable[[View], Derived | None]:
    return lambda view: Derived(getattr(view, name))


# --- precision, clipping, ZeRO -------------------------------------------------------------------


def _stage(view: View) -> Derived:
    if view.zero_stage != "auto":
        return Derived(int(view.zero_stage))
    if view.offload_param != "none":
        return Derived(3, f"offload_param={view.offload_param!r} needs stage 3")
    return Derived(2, "zero_stage='auto' takes stage 2")


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


def _loss_scale(view: View) -> Derived | None:
    return Derived(0, "0 scales dynamically") if view.fp16 else None


def _initial_scale_power(view: View) -> Derived | None:
    return Derived(16, "first loss scale 2**16") if view.fp16 else None


# --- batch ---------------------------------------------------------------------------------------


def _train_batch_size(view: View) -> Derived:
    micro, accumulation = view.per_device_train_batch_size, view.gradient_accumulation_steps
    world = view.facts.world_size
    return Derived(
        micro * accumulation * world,
        f"micro-batch {micro} x accumulation {accumulation} x ranks {world}",
    )


# --- optimizer -----------------------------------------------------------------------------------

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


# --- scheduler: only where the user's config asks for DeepSpeed's own ----------------------------

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
    steps = view.facts.num_training_steps
    if steps is None:
        return None
    import math

    count = view.warmup_steps if view.warmup_steps >= 1 else None
    if count is None:
        count = math.ceil(steps * (view.warmup_steps or view.warmup_ratio))
    return Derived(max(1, int(count)), f"warm-up of {int(count)} steps, at least 1 for DeepSpeed")


# --- sizes from the parameters -------------------------------------------------------------------


def _bucket(view: View) -> Derived | None:
    model = view.facts.model
    if model is None or view.stage == 0:
        return None
    size = min(model.num_trainable, max(model.largest, BUCKET_ELEMENTS))
    return Derived(
        _even(size),
        f"min(trainable {model.num_trainable:,}, max(largest parameter {model.largest:,}, "
        f"{BUCKET_ELEMENTS:,})) elements, made even",
    )


def _even(elements: int) -> int:
    """DeepSpeed asserts that the all-gather bucket is a multiple of 2 (its NCCL alignment)."""
    return max(2, elements + elements % 2)


def _prefetch(view: View) -> Derived | None:
    model = view.facts.model
    if model is None or view.stage < 3:
        return None
    size = min(model.num_parameters, max(model.largest, BUCKET_ELEMENTS))
    return Derived(
        _even(size),
        f"min(parameters {model.num_parameters:,}, max(largest {model.largest:,}, "
        f"{BUCKET_ELEMENTS:,})) elements",
    )


def _persistence(view: View) -> Derived | None:
    model = view.facts.model
    if model is None or view.stage < 3:
        return None
    return Derived(_persistent_below(model), _persistent_how(model))


def _persistent_below(model: ModelFacts) -> int:
    return min(max(model.largest_vector, SMALL_PARAMETER_ELEMENTS), KEPT_PARAMETER_ELEMENTS)


def _persistent_how(model: ModelFacts) -> str:
    return (
        f"max(largest norm or bias {model.largest_vector:,}, {SMALL_PARAMETER_ELEMENTS:,}) "
        "elements: gathering one costs more than keeping it"
    )


# --- the user's own optimizer --------------------------------------------------------------------


def _force_cpu_optimizer(view: View) -> Derived | None:
    if not (view.facts.own_optimizer and view.offloads_optimizer):
        return None
    return Derived(False, "your own optimizer runs as given, on the host")


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
    Binding("bf16.enabled", ("bf16",), _same("bf16")),
    Binding("fp16.enabled", ("fp16",), _same("fp16")),
    Derivation("fp16.loss_scale", "dynamic", ("fp16",), _loss_scale),
    Derivation(
        "fp16.initial_scale_power", "DeepSpeed's first scale", ("fp16",), _initial_scale_power
    ),
    Binding("gradient_clipping", ("max_grad_norm",), _same("max_grad_norm")),
    Binding(
        "train_micro_batch_size_per_gpu",
        ("per_device_train_batch_size",),
        _same("per_device_train_batch_size"),
    ),
    Binding(
        "gradient_accumulation_steps",
        ("gradient_accumulation_steps",),
        _same("gradient_accumulation_steps"),
    ),
    Derivation(
        "train_batch_size",
        "micro-batch x accumulation x ranks",
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        _train_batch_size,
        exact=True,
    ),
    Binding("optimizer.type", ("optim",), _optimizer_type, adopt=_optimizer_names),
    Binding("optimizer.params.lr", ("learning_rate",), _same("learning_rate")),
    Binding(
        "optimizer.params.betas",
        ("adam_beta1", "adam_beta2"),
        _for_adam(lambda view: [view.adam_beta1, view.adam_beta2]),
        adopt=lambda value: tuple(value),
    ),
    Binding("optimizer.params.eps", ("adam_epsilon",), _for_adam(lambda view: view.adam_epsilon)),
    Binding("optimizer.params.weight_decay", ("weight_decay",), _same("weight_decay")),
    Derivation(
        "optimizer.params.torch_adam",
        "torch's AdamW unless the optimizer is offloaded or a DeepSpeed kernel was asked for",
        ("optim", "offload_optimizer"),
        _torch_adam,
    ),
    Derivation("optimizer.params.fused", "torch's fused kernel when asked for", ("optim",), _fused),
    Derivation(
        "timers.throughput.enabled",
        "off",
        (),
        lambda view: Derived(False, "DeepSpeed's timer waits for the device at every micro-batch"),
    ),
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
    Binding(
        "scheduler.params.warmup_max_lr",
        ("learning_rate",),
        _same("learning_rate"),
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
    Derivation(
        "zero_optimization.reduce_bucket_size",
        "the model's size, at least its largest parameter, at most 5e7 elements",
        (),
        _bucket,
    ),
    Derivation(
        "zero_optimization.allgather_bucket_size",
        "the model's size, at least its largest parameter, at most 5e7 elements",
        (),
        lambda view: _bucket(view) if view.stage in (1, 2) else None,
    ),
    Derivation(
        "zero_optimization.stage3_prefetch_bucket_size",
        "the model's size, at least its largest parameter, at most 5e7 elements",
        (),
        _prefetch,
    ),
    Derivation(
        "zero_optimization.stage3_param_persistence_threshold",
        "the largest one-dimensional parameter, at least 1e4 elements",
        (),
        _persistence,
    ),
)


def readable_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments as a plain mapping, shallow."""
    return {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
