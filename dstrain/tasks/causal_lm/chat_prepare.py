"""Samples of conversations: made once per machine, and memory-mapped from then on.

Samples of a stream are made by every rank while it reads the stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem
from dstrain.core.files import expanded
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.chat import DEFAULT_TEMPLATE, ChatEncoder, joined, pack, shorten
from dstrain.tasks.causal_lm.conversations import STREAM_TRIED_ROWS, LeftOut, messages_of
from dstrain.tasks.causal_lm.sources import Documents
from dstrain.tasks.common.cache import fingerprint_tokenizer
from dstrain.tasks.common.rows import STREAMED_TOGETHER

PACKED_TOGETHER = 1000
"""Conversations that are packed together: more waste fewer tokens, and take longer to place."""
_VERSION = 1  # of the samples; raise it when the same input gives other samples

_logger = get_logger(__name__)


@dataclass(frozen=True)
class ChatSamples:
    """Samples of both splits: ``input_ids``, ``labels``, and ``position_ids`` if packed.

    Attributes:
        train: samples to train on; a stream if the conversations are a stream.
        validation: held-out samples; None if nothing was held out.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None


def set_template(tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> None:
    """Set the tokenizer's template to that of ``--chat_template``, or if it has none to a default.

    The template is saved with the tokenizer.

    Raises:
        DataError: the file cannot be read, or the tokenizer has neither a template nor the EOS
            token that the default template needs.
    """
    if args.chat_template is not None:
        try:
            tokenizer.chat_template = expanded(args.chat_template).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(
                Problem(
                    f"--chat_template {args.chat_template} cannot be read",
                    str(error),
                    "give a file with a Jinja template",
                )
            ) from error
    elif tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise DataError(
                Problem(
                    "the tokenizer has neither a chat template nor an EOS token",
                    "the default template ends every answer with EOS",
                    "give --chat_template, or another tokenizer",
                )
            )
        tokenizer.chat_template = DEFAULT_TEMPLATE
        _logger.info("the tokenizer has no chat template: it gets a simple one")


def prepare_chat(
    conversations: Documents,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    *,
    ranks: Ranks | None = None,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ChatSamples:
    """Tokenise both splits of ``conversations``, or load the samples that an earlier run cached.

    A conversation of more than ``block_size`` tokens is cut to its first ``block_size`` tokens, and
    left out if none of these is of an answer. Except for a stream, the log says how many
    conversations are cut and left out. With ``packing``, conversations that are whole or cut share
    blocks of at most ``block_size`` tokens.

    Raises:
        DataError: the template cannot render a conversation, or a split has no sample.
    """

    def encode(
        name: str, rows: Any, fingerprint: str | None, limit: int | None
    ) -> Dataset | IterableDataset:
        if isinstance(rows, IterableDataset):
            return _encode_stream(name, rows, tokenizer, args, limit)
        facts = [
            _VERSION,
            fingerprint,
            fingerprint_tokenizer(tokenizer),
            tokenizer.chat_template,
            *(args.block_size, args.train_on_answers),
            tokenizers.__version__,
        ]
        samples = rows.map(
            _encode,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "args": args},
            remove_columns=rows.column_names,
            new_fingerprint=_hash(facts),
            num_proc=args.preprocessing_num_workers,
            desc=f"Tokenising {name}",
        )
        _check_some(name, rows, samples, args.block_size)
        if ranks is None or ranks.is_main:
            _report(name, rows, samples, args.block_size)
        samples = samples.remove_columns(["num_tokens"])
        if args.packing:
            samples = samples.map(
                _pack,
                batched=True,
                batch_size=PACKED_TOGETHER,
                fn_kwargs={"block_size": args.block_size},
                new_fingerprint=_hash(["packed", PACKED_TOGETHER, *facts]),
                desc=f"Packing {name}",
            )
        if limit is not None:
            samples = samples.select(range(min(limit, len(samples))))
        return samples.with_format("numpy")

    with main_first():
        train = encode(
            "train", conversations.train, conversations.train_fingerprint, args.max_train_samples
        )
        held_out = None
        if conversations.validation is not None:
            held_out = encode(
                "validation",
                conversations.validation,
                conversations.validation_fingerprint,
                args.max_eval_samples,
            )
    return ChatSamples(train, held_out)


def _encode_stream(
    name: str,
    rows: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    limit: int | None,
) -> IterableDataset:
    """Return the stream of samples of a stream of conversations."""
    given = {"tokenizer": tokenizer, "args": args, "left_out": LeftOut()}

    def encoded(part: IterableDataset) -> IterableDataset:
        return part.map(
            _encode_streamed,
            batched=True,
            batch_size=STREAMED_TOGETHER,
            fn_kwargs=given,
            remove_columns=["conversation", "place"],
        )

    if next(iter(encoded(rows.take(STREAM_TRIED_ROWS))), None) is None:
        raise _no_answer(name, f"the first {STREAM_TRIED_ROWS:,}", args.block_size)
    samples = encoded(rows)
    if args.packing:
        samples = samples.map(
            _pack,
            batched=True,
            batch_size=PACKED_TOGETHER,
            fn_kwargs={"block_size": args.block_size},
        )
    return samples if limit is None else samples.take(limit)


def _check_some(name: str, rows: Dataset, samples: Dataset, block_size: int) -> None:
    if not len(samples):
        raise _no_answer(name, f"all {len(rows):,}", block_size)


def _no_answer(name: str, which: str, block_size: int) -> DataError:
    return DataError(
        Problem(
            f"no {name} conversation has an answer within block_size={block_size} tokens",
            f"{which} are longer before their first answer",
            "raise --block_size",
        )
    )


def _report(name: str, rows: Dataset, samples: Dataset, block_size: int) -> None:
    """Log how many conversations were cut, and how many were left out."""
    cut = int((np.asarray(samples["num_tokens"]) > block_size).sum())
    left_out = len(rows) - len(samples)
    if cut or left_out:
        _logger.warning(
            "%s: of %s conversations %s are cut to block_size=%s tokens and %s are left out, with "
            "no answer in them",
            name,
            f"{len(rows):,}",
            f"{cut:,}",
            block_size,
            f"{left_out:,}",
        )


def _encode(
    rows: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> dict[str, list[Any]]:
    """Return token ids and labels of a batch of rows, and how many tokens each had before a cut."""
    encode = ChatEncoder(tokenizer, answers=args.train_on_answers)
    found: dict[str, list[Any]] = {"input_ids": [], "labels": [], "num_tokens": []}
    for conversation, place in zip(rows["conversation"], rows["place"], strict=True):
        ids, labels = encode(messages_of({"conversation": conversation}), place)
        kept = shorten(ids, labels, args.block_size)
        if kept is not None:
            found["input_ids"].append(kept[0])
            found["labels"].append(kept[1])
            found["num_tokens"].append(len(ids))
    return found


def _encode_streamed(
    rows: dict[str, list[str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    left_out: LeftOut,
) -> dict[str, list[Any]]:
    """Encode a batch of rows of a stream; warn once of conversations that are left out."""
    found = _encode(rows, tokenizer=tokenizer, args=args)
    if len(found.pop("num_tokens")) < len(rows["place"]):
        left_out(f"conversations without an answer in their first {args.block_size} tokens")
    return found


def _pack(rows: dict[str, list[list[int]]], *, block_size: int) -> dict[str, list[Any]]:
    conversations = list(zip(rows["input_ids"], rows["labels"], strict=True))
    samples = [joined(block) for block in pack(conversations, block_size)]
    names = ("input_ids", "labels", "position_ids")
    return {name: [sample[name] for sample in samples] for name in names}


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
