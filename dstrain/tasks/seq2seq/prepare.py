"""Samples of pairs of texts: made once per machine, and memory-mapped from then on.

Samples of a stream are made by every rank while it reads the stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import tokenizers
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.tasks.common.cache import fingerprint_tokenizer
from dstrain.tasks.common.rows import STREAMED_TOGETHER
from dstrain.tasks.seq2seq.arguments import DataArguments
from dstrain.tasks.seq2seq.sources import Pairs

_VERSION = 1  # of the samples; raise it when the same input gives other samples

_logger = get_logger(__name__)


@dataclass(frozen=True)
class EncodedPairs:
    """Samples of both splits: ``input_ids``, ``attention_mask`` and ``labels``, unpadded.

    Attributes:
        train: samples to train on; a stream if the pairs are a stream.
        validation: held-out samples; None if nothing was held out.
        validation_pairs: pairs of texts of ``validation``, in the same order.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    validation_pairs: Dataset | IterableDataset | None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot pad, or whose targets would never end.

    Raises:
        DataError: the tokenizer has no padding token, or does not end texts with EOS.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    problems = []
    if tokenizer.pad_token_id is None:
        problems.append(
            Problem(f"the tokenizer {name} has no padding token", "samples differ in length")
        )
    ids = tokenizer(text_target="a")["input_ids"]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in ids:
        problems.append(
            Problem(
                f"the tokenizer {name} does not end texts with EOS",
                "a model that never sees the end of a target does not learn to stop",
                "use the tokenizer of a sequence-to-sequence model, or let one be trained here",
            )
        )
    if problems:
        raise DataError(problems)


def prepare(
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    *,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> EncodedPairs:
    """Tokenise both splits of ``pairs``, or load the samples that an earlier run cached.

    A source is ``source_prefix`` and the text, cut to ``max_source_length`` tokens; a target is cut
    to ``max_target_length`` tokens. Both end with EOS, even if they are cut.
    """

    def encode(
        name: str, rows: Dataset | IterableDataset, fingerprint: str | None, limit: int | None
    ) -> Dataset | IterableDataset:
        if isinstance(rows, IterableDataset):
            return _encode_stream(name, rows, tokenizer, args, limit)
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        facts = [
            _VERSION,
            fingerprint,
            limit,
            fingerprint_tokenizer(tokenizer),
            *(args.source_prefix, args.max_source_length, args.max_target_length),
            tokenizers.__version__,
        ]
        samples = rows.map(
            _encode,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "args": args},
            remove_columns=rows.column_names,
            # The fingerprint of datasets would depend on unrelated state of the tokenizer object.
            new_fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32],
            desc=f"Tokenising {name}",
        )
        _report(name, samples, args)
        return samples

    with main_first():
        train = encode("train", pairs.train, pairs.train_fingerprint, args.max_train_samples)
        held_out = None
        if pairs.validation is not None:
            held_out = encode(
                "validation", pairs.validation, pairs.validation_fingerprint, args.max_eval_samples
            )
    return EncodedPairs(train, held_out, pairs.validation)


def _encode_stream(
    name: str,
    rows: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    limit: int | None,
) -> IterableDataset:
    """Return the stream of samples of a stream of pairs."""
    samples = rows.map(
        _encode,
        batched=True,
        batch_size=STREAMED_TOGETHER,
        fn_kwargs={"tokenizer": tokenizer, "args": args},
        remove_columns=["source", "target"],
    )
    if limit is not None:
        samples = samples.take(limit)
    if next(iter(samples), None) is None:
        raise DataError(
            Problem(
                f"the {name} stream has nothing left",
                "copies of held-out rows are left out, and there are no others",
                "give other data, or --validation_percentage 0",
            )
        )
    return samples


def _report(name: str, samples: Dataset, args: DataArguments) -> None:
    """Log how many sources and targets have the most tokens, and so may have been cut."""
    limits = {"source": ("input_ids", args.max_source_length)}
    limits["target"] = ("labels", args.max_target_length)
    for text, (column, limit) in limits.items():
        lengths = pc.list_value_length(samples.with_format("arrow")[:][column])
        full = int(pc.sum(pc.equal(lengths, limit)).as_py() or 0)
        if full:
            _logger.info(
                "%s: %s of %s fill all %s tokens of max_%s_length; what was longer is cut",
                name,
                f"{full:,} {text}s",
                f"{len(samples):,}",
                limit,
                text,
            )


def _encode(
    rows: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> dict[str, list[list[int]]]:
    """Return token ids of sources and targets of a batch of rows, cut to the longest lengths."""
    sources = [args.source_prefix + source for source in rows["source"]]
    encoded = tokenizer(
        sources,
        max_length=args.max_source_length,
        truncation=True,
        return_token_type_ids=False,
        return_attention_mask=True,
    )
    targets = tokenizer(
        text_target=rows["target"], max_length=args.max_target_length, truncation=True
    )
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": targets["input_ids"],
    }
