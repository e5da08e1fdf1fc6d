"""Arguments of a schedule that it does not take."""

from __future__ import annotations

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.trainer.build import start_run


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
    with pytest.raises(ConfigError, match=rf"lr_scheduler_type='{kind}' with .*(.|\n)*{why}"):
        start_run(args)
