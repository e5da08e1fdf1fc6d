"""Arguments of a schedule that it does not take."""

from __future__ import annotations

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.trainer.build import resolve_config, start_run


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("linear", {"num_cycles": 1}, "unexpected keyword argument 'num_cycles'"),
        ("cosine", {"num_cycles": "x"}, "'x'|str"),
        ("polynomial", {"lr_end": 1.0}, "lr_end"),
        ("cosine_with_min_lr", {"min_lr": None}, "min_lr"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_refused_at_the_start(kind, given, why):
    """They were a TypeError when the engine was built, on each rank."""
    args = TrainingArguments(lr_scheduler_type=kind, lr_scheduler_kwargs=given, use_cpu=True)
    ranks = start_run(args)
    with pytest.raises(ConfigError, match=rf"lr_scheduler_type='{kind}' with .*(.|\n)*{why}"):
        resolve_config(args, ranks)


def test_the_rate_of_the_deepspeed_config_counts():
    """A schedule that ends above the default rate, and below the one that runs."""
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    args = TrainingArguments(
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": 1e-3},
        deepspeed=config,
        use_cpu=True,
    )
    assert resolve_config(args, start_run(args)).learning_rate == 1e-2
