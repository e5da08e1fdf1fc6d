"""Which evaluation is the best one."""

from __future__ import annotations

import math

import pytest

from dstrain.core.errors import ConfigError
from dstrain.evaluation import BestRule

LOSS = BestRule("loss", greater_is_better=False)
F1 = BestRule("eval_f1", greater_is_better=True)


def test_the_metric_is_named_with_or_without_its_prefix():
    assert LOSS.key == "eval_loss"
    assert F1.key == "eval_f1"
    assert BestRule("data1_loss", greater_is_better=False).key == "eval_data1_loss"


@pytest.mark.parametrize(
    ("rule", "value", "than", "expected"),
    [
        (LOSS, 1.0, None, True),
        (LOSS, 0.9, 1.0, True),
        (LOSS, 1.0, 1.0, False),  # the first of equal ones stays
        (F1, 1.1, 1.0, True),
        (F1, 0.9, 1.0, False),
        (F1, math.nan, None, False),
        (LOSS, math.nan, 1.0, False),
        (LOSS, math.inf, None, True),
    ],
)
def test_what_is_better(rule, value, than, expected):
    assert rule.is_better(value, than) is expected


def test_the_best_of_several_is_the_earliest_of_equal_ones():
    assert LOSS.best_of({30: 0.5, 10: 0.7, 20: 0.5, 40: math.nan}) == 20
    assert F1.best_of({30: 0.5, 10: 0.7}) == 10
    assert F1.best_of({30: math.nan}) is None
    assert F1.best_of({}) is None


def test_a_missing_metric_is_named_with_those_that_are_there():
    error = F1.missing(["eval_loss", "eval_accuracy"])
    assert isinstance(error, ConfigError)
    assert "no 'eval_f1'" in str(error)
    assert "eval_accuracy, eval_loss" in str(error)
