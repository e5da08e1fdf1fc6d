"""Parameters of optimizers and schedules by type: those of their constructors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dstrain.config.schema.entry import (
    NO_DEFAULT,
    NONE,
    Key,
    Refused,
    Section,
    flag,
    listing,
    number,
    text,
    whole,
)
from dstrain.config.schema.generated import DEEPSPEED_VERSION

_MAX_GRAD_NORM = Refused(
    "DeepSpeed does not clip through an optimizer parameter", "set gradient_clipping"
)
_BETAS = listing([0.9, 0.999], number(minimum=0.0, below=1.0))
_TORCH = {
    "foreach": flag(None), "fused": flag(None), "maximize": flag(), "differentiable": flag(),
}  # fmt: skip
_STATES = {"fp32_optimizer_states": flag(True)}  # offloaded to the CPU


def _optimizer(lr: Any, **keys: Key) -> Section:
    rates = {"lr": number(lr, 0.0), "weight_decay": number(0.0, 0.0)}
    return Section({**rates, **keys, "max_grad_norm": _MAX_GRAD_NORM})


_ADAM_KEYS = {
    "betas": _BETAS, "eps": number(1e-8, 0.0), "bias_correction": flag(True), "amsgrad": flag(),
    "set_grad_none": flag(True), "adam_w_mode": flag(True), "torch_adam": flag(),
    "capturable": flag(), **_TORCH, **_STATES,
}  # fmt: skip
OPTIMIZER_PARAMS: Final[Mapping[str, Section]] = {
    # torch's Adam alone takes decoupled_weight_decay.
    "adam": _optimizer(1e-3, decoupled_weight_decay=flag(), **_ADAM_KEYS),
    "adamw": _optimizer(1e-3, **_ADAM_KEYS),
    "adagrad": _optimizer(
        1e-2, eps=number(1e-10, 0.0), amsgrad=flag(), lr_decay=number(0.0, 0.0),
        initial_accumulator_value=number(0.0, 0.0), **_TORCH, **_STATES,
    ),
    "lamb": _optimizer(
        1e-3, betas=_BETAS, eps=number(1e-8, 0.0), bias_correction=flag(True), amsgrad=flag(),
        eps_inside_sqrt=flag(), max_coeff=number(10.0), min_coeff=number(0.01),
    ),
    "lion": _optimizer(1e-3, betas=_BETAS, set_grad_none=flag(True), **_STATES),
    # lr is for both optimizers inside Muon, with the defaults 0.02 (Muon) and 3e-4 (Adam).
    "muon": _optimizer(
        NO_DEFAULT, momentum=number(0.95), ns_method=text("gram", "gram", "standard"),
        muon_lr=number(NO_DEFAULT, 0.0), adam_lr=number(NO_DEFAULT, 0.0),
        betas=listing([0.9, 0.95], number(minimum=0.0, below=1.0)), eps=number(1e-10, 0.0),
        adam_w_mode=flag(True), torch_adam=flag(), foreach=flag(None), **_STATES,
    ),
    "sgd": _optimizer(
        1e-3, momentum=number(0.0, 0.0), dampening=number(0.0), nesterov=flag(), **_TORCH
    ),
}  # fmt: skip

DEEPSPEED_OPTIMIZERS: Final = (
    "Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD",
)  # fmt: skip
TORCH_OPTIMIZERS: Final = (
    "ASGD", "Adadelta", "Adafactor", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    "SparseAdam",
)  # fmt: skip
_ONE_BIT = Refused(
    f"DeepSpeed {DEEPSPEED_VERSION} removed the 1-bit optimizers", "use AdamW or Lamb"
)

_RATE = Key((float, list), minimum=0.0, items=number(minimum=0.0))  # a list: one per group


def _rate(default: Any) -> Key:
    kinds = (float, list, NONE) if default is None else (float, list)
    return Key(kinds, default, minimum=0.0, items=_RATE.items)


_WARMUP = {
    "warmup_num_steps": whole(1000, 1), "warmup_type": text("log", "log", "linear"),
    "last_batch_iteration": whole(-1, -1),
}  # fmt: skip
SCHEDULER_PARAMS: Final[Mapping[str, Section]] = {
    "lrrangetest": Section({
        "lr_range_test_min_lr": _rate(1e-3), "lr_range_test_step_size": whole(2000, 1),
        "lr_range_test_step_rate": number(1.0), "lr_range_test_staircase": flag(),
        "last_batch_iteration": whole(-1, -1),
    }),
    "onecycle": Section({
        "cycle_min_lr": _RATE, "cycle_max_lr": _RATE, "decay_lr_rate": number(0.0),
        "cycle_first_step_size": number(2000, above=0.0),
        "cycle_second_step_size": number(None, 0.0),
        "cycle_first_stair_count": whole(0, 0), "cycle_second_stair_count": whole(None, 0),
        "decay_step_size": number(0, 0.0), "cycle_momentum": flag(True),
        "cycle_min_mom": _rate(0.8), "cycle_max_mom": _rate(0.9), "decay_mom_rate": number(0.0),
        "last_batch_iteration": whole(-1, -1),
    }),
    "warmuplr": Section({
        "warmup_min_lr": _rate(0.0), "warmup_max_lr": _rate(None), **_WARMUP,
    }),
    "warmupdecaylr": Section({
        "total_num_steps": whole(NO_DEFAULT, 1), "warmup_min_lr": _rate(0.0),
        "warmup_max_lr": _rate(0.001), **_WARMUP,
    }),
    "warmupcosinelr": Section({
        "total_num_steps": whole(NO_DEFAULT, 1), "warmup_min_ratio": number(0.0, 0.0),
        "cos_min_ratio": number(0.0001, 0.0), **_WARMUP,
    }),
}  # fmt: skip
DEEPSPEED_SCHEDULERS: Final = (
    "LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR",
)  # fmt: skip
TORCH_SCHEDULERS: Final = (
    "ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts",
    "CyclicLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR",
    "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "SequentialLR", "StepLR",
)  # fmt: skip

OPTIMIZER: Final = Section({
    "type": text(
        None, *TORCH_OPTIMIZERS, any_case=DEEPSPEED_OPTIMIZERS,
        refused=dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), _ONE_BIT),
    ),
    "params": Section(
        {"max_grad_norm": _MAX_GRAD_NORM}, open=True, by_type=OPTIMIZER_PARAMS, nullable=True
    ),
    "legacy_fusion": flag(),
})  # fmt: skip
SCHEDULER: Final = Section({
    "type": text(None, *DEEPSPEED_SCHEDULERS, *TORCH_SCHEDULERS),
    "params": Section(open=True, by_type=SCHEDULER_PARAMS),
})  # fmt: skip
