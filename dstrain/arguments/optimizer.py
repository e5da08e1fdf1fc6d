"""Arguments about the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import (
    alias,
    deepspeed_key,
    implemented,
    refused,
)
from dstrain.core.errors import Problem

# Names of transformers.OptimizerNames, of DeepSpeed's optimizers, and of further ones of torch.
# config/optimizer_table.py has the implementation of each, or the reason why it cannot run.
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adam", "adamw_hf", "adamw_torch_xla",
    "adamw_torch_npu_fused", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "nadam", "radam", "adamax", "stable_adamw", "grokadamw",
    "lion", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "muon", "lamb",
    "adafactor", "adagrad", "sgd", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit", "adadelta", "asgd", "rprop",
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "apollo_adamw_layerwise", "lomo", "adalomo",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
)  # fmt: skip

# Schedules of transformers.SchedulerType whose step needs the metric of an evaluation.
METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")
# Schedules that begin at the full rate, without warm-up.
WITHOUT_WARMUP = ("constant", *METRIC_SCHEDULERS)
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    *METRIC_SCHEDULERS,
)


def split_optim_args(text: str | None) -> dict[str, str]:
    """Return the pairs of "name=value,name=value"; a comma in brackets belongs to the value.

    Raises:
        ValueError: a part of the text is no such pair, or has the name of an earlier pair.
    """
    pairs: dict[str, str] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text.replace(" ", "") if text else ""):
        name, equals, value = part.partition("=")
        if not part and not pairs:
            continue
        if not (name and equals and value) or name in pairs:
            raise ValueError(part)
        pairs[name] = value
    return pairs


def _adafactor(arguments: Any, value: bool) -> str:
    """Return the value of ``optim`` for ``adafactor=True``."""
    if arguments.optim not in ("adamw_torch", "adafactor"):
        raise ValueError(arguments.optim)
    return "adafactor"


@dataclass
class OptimizerArguments:
    """Optimizer, its hyperparameters, clipping and schedule."""

    learning_rate: float = arg(
        5e-5,
        "Peak learning rate.",
        treatment=deepspeed_key("optimizer.params.lr", "scheduler.params.warmup_max_lr"),
    )
    weight_decay: float = arg(
        0.0,
        "Decoupled weight decay of all parameters but biases and normalisation weights.",
        treatment=deepspeed_key("optimizer.params.weight_decay"),
    )
    adam_beta1: float = arg(
        0.9, "Decay of Adam's first moment.", treatment=deepspeed_key("optimizer.params.betas")
    )
    adam_beta2: float = arg(
        0.999, "Decay of Adam's second moment.", treatment=deepspeed_key("optimizer.params.betas")
    )
    adam_epsilon: float = arg(
        1e-8,
        "Term added to Adam's denominator.",
        treatment=deepspeed_key("optimizer.params.eps"),
    )
    max_grad_norm: float = arg(
        1.0,
        "Global gradient norm above which gradients are scaled down; 0 turns clipping off.",
        treatment=deepspeed_key("gradient_clipping", note="always written"),
    )
    optim: str = arg(
        "adamw_torch",
        "Optimizer. With optimizer offload the AdamW names run DeepSpeed's CPU Adam.",
        choices=OPTIMIZERS,
        treatment=deepspeed_key(
            "optimizer.type",
            note="what DeepSpeed does not build by name dstrain builds; what cannot run is refused "
            "with the stage and offload (table in `dstrain/config/README.md`)",
        ),
    )
    optim_args: str | None = arg(
        None,
        "Further arguments of the optimizer, as name=value,name=value.",
        treatment=implemented("checked against the optimizer, and written to `optimizer.params`"),
    )
    adafactor: bool = arg(
        False,
        "Old way to write optim='adafactor'.",
        treatment=alias("optim", convert=_adafactor, note="as 'adafactor'"),
    )
    optim_target_modules: list[str] | str | None = arg(
        None,
        "Modules that GaLore and APOLLO optimizers work on.",
        treatment=refused(
            "only the GaLore and APOLLO optimizers read it, and those are refused",
            "leave it out; use adamw_torch, or train few parameters with LoRA (peft)",
        ),
    )
    lr_scheduler_type: str = arg(
        "linear",
        "Learning-rate schedule (transformers.SchedulerType).",
        choices=SCHEDULERS,
        treatment=implemented(
            "`transformers.get_scheduler`, stepped by the engine; a `scheduler` section in the "
            "DeepSpeed config wins; `reduce_lr_on_plateau` and `greedy` follow "
            "`metric_for_best_model` after every evaluation, in the direction of "
            "`greater_is_better`"
        ),
    )
    # `str` is for HfArgumentParser, which passes the JSON of a shell as text.
    lr_scheduler_kwargs: dict[str, Any] | str | None = arg(
        {},
        'Extra arguments of the schedule, such as {"min_lr": 1e-6} of cosine_with_min_lr.',
        treatment=implemented(),
    )
    warmup_ratio: float = arg(
        0.0,
        "Share of all steps used for warm-up; warmup_steps wins over it.",
        treatment=implemented("fills `scheduler.params.warmup_num_steps` too"),
    )
    warmup_steps: float = arg(
        0,
        "Steps of linear warm-up from 0; a value between 0 and 1 is a share of all steps.",
        treatment=implemented("fills `scheduler.params.warmup_num_steps` too"),
    )

    def scheduler_kwargs(self) -> dict[str, Any]:
        """Return a copy of ``lr_scheduler_kwargs``, empty for none."""
        assert not isinstance(self.lr_scheduler_kwargs, str), "parsed on construction"
        return dict(self.lr_scheduler_kwargs or {})

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the warm-up steps of a run of ``num_training_steps``; a share is rounded up."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio))

    def _optimizer_problems(self) -> list[Problem]:
        problems = []
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if not value >= 0 or math.isinf(value):
                problems.append(
                    Problem(f"{name}={value}", "a finite number of 0 or more is needed")
                )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                problems.append(Problem(f"{name}={value}", "0 <= beta < 1 is needed"))
        try:
            split_optim_args(self.optim_args)
        except ValueError as error:
            problems.append(
                Problem(
                    f"optim_args={self.optim_args!r}",
                    f"{str(error)!r} is no name=value, or its name stands twice",
                    "write name=value,name=value",
                )
            )
        if not 0 <= self.warmup_ratio <= 1:
            problems.append(
                Problem(f"warmup_ratio={self.warmup_ratio}", "a share between 0 and 1 is needed")
            )
        steps = self.warmup_steps
        if steps < 0 or (steps > 1 and not float(steps).is_integer()):
            problems.append(
                Problem(
                    f"warmup_steps={steps}",
                    "a whole number of steps, or a share between 0 and 1, is needed",
                )
            )
        return problems
