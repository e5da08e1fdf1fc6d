"""One rank's pass over its batches: an error ends it at once where no other could hear of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dstrain.evaluation.loop import EvalBatch, Prediction, evaluate_batches

NUM_BATCHES = 5


class PredictionReceiver:
    """Keeps what it is given, and raises what failed two batches later, where ranks would meet."""

    def __init__(self) -> None:
        self.kept: list[Prediction | None] = []
        self.failure: Exception | None = None

    def add(self, batch: EvalBatch, prediction: Prediction | None) -> None:
        self.kept.append(prediction)
        if self.failure is not None and len(self.kept) == NUM_BATCHES - 1:
            raise self.failure

    def fail(self, error: Exception) -> None:
        self.failure = error

    def abort(self, error: Exception) -> None:
        raise error


def breaking(where: str, keep: PredictionReceiver | None, read: list[int]) -> Any:
    """Run an evaluation in which something breaks at the second batch."""

    def batches() -> Iterator[EvalBatch]:
        for index in range(NUM_BATCHES):
            read.append(index)
            yield EvalBatch(index, 1, is_last=index == NUM_BATCHES - 1)

    def breaks(name: str, at: int) -> None:
        if name == where and at == 1:
            raise ArithmeticError(name)

    def predict(inputs: int) -> Prediction:
        breaks("predict", inputs)
        return Prediction(torch.tensor(float(inputs)))

    def finish(prediction: Prediction) -> Prediction:
        breaks("finish", int(prediction.loss))
        return prediction

    return evaluate_batches(
        batches(),
        predict,
        lambda batch: (1,),
        device="cpu",
        finish=finish,
        keep=keep,
        on_step=lambda: breaks("on_step", read[-1]),
    )


@pytest.mark.parametrize("where", ["predict", "finish", "on_step"])
def test_where_nothing_is_sent_an_error_ends_it_at_once(where):
    """Catches a rank that goes on for an hour although its evaluation has failed."""
    read: list[int] = []
    with pytest.raises(ArithmeticError, match=where):
        breaking(where, None, read)
    assert read == [0, 1]


@pytest.mark.parametrize("where", ["finish", "on_step"])
def test_where_predictions_are_sent_it_goes_on_to_that_point_with_nothing_to_keep(where):
    """So that the others, which wait in a forward pass, come to where they hear of it."""
    keep, read = PredictionReceiver(), []
    with pytest.raises(ArithmeticError, match=where):
        breaking(where, keep, read)
    assert read == [0, 1, 2, 3]
    assert [kept is None for kept in keep.kept[-2:]] == [True, True]


def test_without_an_error_the_mean_is_over_all_targets():
    assert breaking("nowhere", None, []).loss == pytest.approx(2.0)
