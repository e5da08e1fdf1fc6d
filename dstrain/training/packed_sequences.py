"""Finding out by trial whether a model keeps the sequences of a packed row apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dstrain.training.key_value_cache import KeyValueCache

_FIRST, _SECOND = 5, 4  # tokens of the two sequences
# Kernels may add in another order where other experts are busy; a leak is not of that size.
_NOISE_FACTOR = 8.0


def mixes_sequences(
    model: torch.nn.Module,
    module: torch.nn.Module,
    batch_of: Callable[[Sequence[list[int]]], Mapping[str, object]],
    prepare: Callable[[object], Mapping[str, object]],
) -> bool | None:
    """Test whether a sequence changes a causal model's outputs for the next one in its row.

    Which models look at ``position_ids`` for that, with which attention, is written down nowhere,
    and what they do when they do not is to train on, silently. So two short sequences go through
    the model, then the same with another first one: what comes out for the second must not change.
    How much it may change by rounding alone (in a mixture of experts) is seen with the sequences
    the other way round, where none can see what comes later. Four forward passes over a few tokens;
    at ZeRO stage 3 all ranks must call it.

    Args:
        model: the engine or module to call; it is in evaluation mode afterwards.
        module: the core model.
        batch_of: two sequences of token ids -> the batch that a collator makes of them in one row,
            or in several equal rows.
        prepare: batch -> inputs on the model's device.

    Returns:
        None where it cannot be told: the vocabulary is not known, or there are no logits.
    """
    size = _vocabulary_size(module)
    if size is None:
        return None
    draw = torch.Generator().manual_seed(0)
    first, second = (  # not from the ends of the vocabulary, where special tokens are
        torch.randint(size // 10, size // 2, (length,), generator=draw).tolist()
        for length in (_FIRST, _SECOND)
    )
    changed = [token + 1 for token in first]
    model.eval()

    def logits(*sequences: list[int]) -> torch.Tensor | None:
        batch = batch_of(sequences)
        inputs = prepare({k: v for k, v in batch.items() if "label" not in k})
        outputs = model(**inputs)
        found = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(found, torch.Tensor) or found.dim() != 3:
            return None
        return found.float() if found.shape[1] == _FIRST + _SECOND else None

    with torch.no_grad(), KeyValueCache(module).as_asked():
        tried = [
            logits(*pair)
            for pair in ((first, second), (changed, second), (second, first), (second, changed))
        ]
    found = [each for each in tried if each is not None]
    if len(found) < len(tried):
        return None
    behind, behind_changed, before, before_changed = found
    leaked = (behind - behind_changed)[:, _FIRST:].abs().max()
    noise = (before - before_changed)[:, :_SECOND].abs().max()
    return bool(leaked > _NOISE_FACTOR * noise)


def flattened(collate: object) -> Callable[[Sequence[list[int]]], Mapping[str, object]] | None:
    """Return ``batch_of`` for a collator that makes one row of all samples; None for others."""
    from transformers import DataCollatorWithFlattening

    if not isinstance(collate, DataCollatorWithFlattening):
        return None
    return lambda sequences: collate([{"input_ids": tokens} for tokens in sequences])


def _vocabulary_size(module: object) -> int | None:
    config = getattr(module, "config", None)
    text = getattr(config, "get_text_config", None)
    size = getattr(config if text is None else text(), "vocab_size", None)
    return size if isinstance(size, int) and size > 2 * _FIRST else None
