"""Expected predictions of small models, and a metric that keeps what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from tests.models import RaggedTokens, pad_collate, tiny_llama

EVERYTHING_WIDE = {
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
}


class Spy:
    """A compute_metrics that keeps what it was given."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[Any] = []
        self.fails = fails

    def __call__(self, prediction: Any) -> dict[str, Any]:
        self.calls.append(prediction)
        if self.fails:
            raise RuntimeError(self.fails)
        right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"right": np.float64(right[prediction.label_ids[:, 1:] != -100].mean())}


class Stream(IterableDataset[Any]):
    """A stream of samples without a length."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        yield from self.samples


def expected_predictions(num_samples: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Compute logits and labels of each sample by a forward pass of its own."""
    logits, labels = [], []
    model = tiny_llama()
    for sample in RaggedTokens(num_samples, seed=99):
        batch = pad_collate([sample])
        with torch.no_grad():
            logits.append(model(**batch).logits[0].numpy())
        labels.append(np.array(sample["labels"]))
    return logits, labels


def check_predictions(predictions: np.ndarray, label_ids: np.ndarray, num_samples: int) -> None:
    logits, labels = expected_predictions(num_samples)
    assert predictions.shape == (num_samples, max(map(len, logits)), logits[0].shape[-1])
    assert label_ids.shape == predictions.shape[:2]
    for index, (row, row_labels) in enumerate(zip(logits, labels, strict=True)):
        np.testing.assert_allclose(predictions[index, : len(row)], row, rtol=1e-4, atol=1e-5)
        assert label_ids[index, : len(row)].tolist() == row_labels.tolist()
        assert (label_ids[index, len(row) :] == -100).all()
