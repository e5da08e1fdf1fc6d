"""Metrics that no record can hold are told at the evaluation that made them, on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.runs import make_trainer

BAD = {
    "an array": (np.array([0.5, 0.25]), r"'eval_f1' is a numpy.ndarray of shape \(2,\)"),
    "a tensor": (torch.ones(2, 2), r"'eval_f1' is a torch.Tensor of shape \(2, 2\)"),
    "inside of a list": ([1.0, np.arange(3)], r"'eval_f1' is a numpy.ndarray of shape \(3,\)"),
    "a set": ({1, 2}, "'eval_f1' is a set"),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", BAD)
def test_a_metric_that_is_no_number_is_named(kind: str, tmp_path: Path) -> None:
    """With its type and the remedy; after training it would be a save that fails."""
    from dstrain.core.errors import DataError

    value, message = BAD[kind]
    trainer = make_trainer(tmp_path, train=8, eval_strategy="epoch", save_strategy="epoch")
    trainer.compute_metrics = lambda prediction: {"f1": value}
    with pytest.raises(DataError, match=message) as caught:
        trainer.train()
    assert "one number for each name" in str(caught.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.ranks(2)
def test_single_numbers_of_any_kind_are_numbers(tmp_path: Path) -> None:
    """Of numpy and torch, with and without dimensions; lists of them stay lists."""
    trainer = make_trainer(tmp_path, train=8, eval_strategy="epoch", save_strategy="epoch")
    trainer.compute_metrics = lambda prediction: {
        "a": np.float32(0.5), "b": np.array(0.5), "c": np.array([0.5]), "d": torch.tensor(0.5),
        "e": torch.tensor([0.5]), "f": [np.float64(0.5)], "g": "text", "h": [float("nan")],
    }  # fmt: skip
    trainer.train()
    trainer.log({"own": torch.tensor(2.0)})
    assert trainer.state.log_history[-1]["own"] == 2.0
    (entry,) = [e for e in trainer.state.log_history if "eval_a" in e]
    assert {entry[f"eval_{name}"] for name in "abcde"} == {0.5}
    assert all(type(entry[f"eval_{name}"]) is float for name in "abcde")
    assert (entry["eval_f"], entry["eval_g"]) == ([0.5], "text")
    assert "eval_h" not in entry, "JSON knows no NaN"
    assert list(tmp_path.glob("checkpoint-*"))
    trainer.close()


@pytest.mark.ranks(2)
def test_a_best_metric_must_be_a_number(tmp_path: Path) -> None:
    """It is compared."""
    from dstrain.core.errors import ConfigError

    trainer = make_trainer(tmp_path, train=8, eval_strategy="epoch", metric_for_best_model="words")
    trainer.compute_metrics = lambda prediction: {"words": "good"}
    with pytest.raises(ConfigError, match="gave 'good'"):
        trainer.train()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("background", [False, True])
def test_what_a_callback_puts_into_the_state_is_named(background: bool, tmp_path: Path) -> None:
    """Not a full disk."""
    from transformers import TrainerCallback

    from dstrain.core.errors import CheckpointError

    class Own(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history[-1]["mine"] = torch.ones(2)

    trainer = make_trainer(
        tmp_path, train=8, evaluation=0, save_strategy="epoch", save_async=background,
        callbacks=[Own()],
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"log_history\[0\].mine is a torch.Tensor") as caught:
        trainer.train()
    assert "disk" not in str(caught.value)
