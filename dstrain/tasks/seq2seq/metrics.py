"""Metrics of generated text: exact match and ROUGE-L, from token ids or from texts.

ROUGE-L is the F-measure of the longest common subsequence of words, as in C.-Y. Lin, "ROUGE: A
Package for Automatic Evaluation of Summaries" (2004), section 3.1, with equal weight of precision
and recall (beta = 1); it is computed per pair, and averaged. Words are runs of letters and digits
of any script in lower case, without stemming. On ASCII text these are the words of Google's
``rouge_score`` package without its stemmer.

The length of the subsequence is computed as in H. Hyyro, "Bit-Parallel LCS-length Computation
Revisited" (2004): one addition of integers per word instead of a row of the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W_]+")
IGNORED = -100


def words_of(text: str) -> list[str]:
    """Split a text into the words that ROUGE compares."""
    return _WORD.findall(text.lower())


def lcs_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Compute the length of the longest common subsequence of two sequences."""
    places: dict[str, int] = {}
    for index, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << index
    # Bit i of `row` is 0 where the table's row grows by one at column i.
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(left) - row.bit_count()


def rouge_l(prediction: str, reference: str) -> float:
    """Compute ROUGE-L (F-measure) of one prediction, 0 to 1; 0 if either text has no word."""
    predicted, expected = words_of(prediction), words_of(reference)
    common = lcs_length(predicted, expected)
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def text_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the means of ``rouge_l`` and ``exact_match``, 0 to 1; texts are stripped."""
    pairs = [(p.strip(), r.strip()) for p, r in zip(predictions, references, strict=True)]
    return {
        "rouge_l": float(np.mean([rouge_l(p, r) for p, r in pairs])),
        "exact_match": float(np.mean([p == r for p, r in pairs])),
    }


class GenerationMetrics:
    """``compute_metrics`` of a Trainer that predicts with ``generate``."""

    def __init__(self, tokenizer: Any) -> None:
        """Keep the tokenizer, which decodes predictions and references."""
        self.tokenizer = tokenizer

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Compute the metrics of an ``EvalPrediction`` of token ids, padded with -100 or pad token.

        ``generated_length`` is the mean number of tokens generated, without special ones.
        """
        ids = prediction.predictions
        ids = ids[0] if isinstance(ids, tuple) else ids
        texts = self.decode(ids)
        metrics = text_metrics(texts, self.decode(prediction.label_ids))
        special = [IGNORED, *self.tokenizer.all_special_ids]
        metrics["generated_length"] = float(np.mean((~np.isin(ids, special)).sum(axis=1)))
        return metrics

    def decode(self, ids: Any) -> list[str]:
        """Decode rows of token ids, shape (rows, length), to texts."""
        ids = np.where(np.asarray(ids) == IGNORED, self.tokenizer.pad_token_id, ids)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts
