"""The parts of a hyperparameter search that need no ranks."""

from __future__ import annotations

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.search.ray import check as check_ray
from dstrain.search.trials import _PACKAGES, default_objective, with_values


@pytest.mark.parametrize(
    ("metrics", "objective"),
    [
        ({"eval_loss": 2.0, "epoch": 1.0}, 2.0),
        ({"eval_loss": 2.0, "eval_runtime": 9.0, "eval_samples_per_second": 7.0}, 2.0),
        (
            {"eval_loss": 2.0, "eval_mem_cpu_alloc_delta": 5, "eval_model_preparation_time": 3.0},
            2.0,
        ),
        ({"eval_loss": 2.0, "eval_f1": 0.5, "eval_recall": 0.25}, 0.75),
        ({"eval_a_loss": 2.0, "eval_b_loss": 1.0}, 3.0),
    ],
)
def test_the_default_objective_is_the_loss_or_the_sum_of_the_metrics(metrics, objective):
    """Times and memory are no part of it: transformers adds up the preparation time."""
    assert default_objective(metrics) == objective


def test_the_backends_are_those_of_transformers_by_its_names():
    from transformers.trainer_utils import HPSearchBackend

    assert set(_PACKAGES) == {backend.value for backend in HPSearchBackend}


def test_a_trials_arguments_are_others_and_checked(caplog):
    args = TrainingArguments("out", learning_rate=1e-3)
    trial = with_values(args, {"learning_rate": 0.5, "seed": 7.9, "learning_rat": 1})
    assert (trial.learning_rate, trial.seed) == (0.5, 7)
    assert (args.learning_rate, args.seed) == (1e-3, 42)
    assert "did you mean learning_rate?" in caplog.text
    with pytest.raises(ConfigError, match="per_device_train_batch_size"):
        with_values(args, {"per_device_train_batch_size": 0})


def test_values_of_array_libraries_are_taken():
    np = pytest.importorskip("numpy")
    trial = with_values(TrainingArguments("out"), {"num_train_epochs": np.int64(2)})
    assert trial.num_train_epochs == 2


@pytest.mark.parametrize(
    ("scheduler", "strategy", "match"),
    [
        ("PopulationBasedTraining", "epoch", "another trial's weights"),
        ("ASHAScheduler", "no", "set eval_strategy"),
    ],
)
def test_schedulers_of_ray_that_cannot_work_are_refused(scheduler, strategy, match):
    with pytest.raises(ConfigError, match=match):
        check_ray(
            world_size=1,
            direction="minimize",
            scheduler=type(scheduler, (), {})(),
            evaluates=strategy != "no",
        )
