"""Data of a run, from text or conversations: tokenizer, samples of both splits, collator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dstrain.core.errors import DataError
from dstrain.core.ranks import Ranks, require_equal
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.chat import collate_conversations
from dstrain.tasks.causal_lm.chat_prepare import prepare_chat, set_template
from dstrain.tasks.causal_lm.conversations import load_conversations, messages_of
from dstrain.tasks.causal_lm.packing import collate_blocks
from dstrain.tasks.causal_lm.prepare import prepare
from dstrain.tasks.causal_lm.sources import Documents, load_documents
from dstrain.tasks.common.cache import fingerprint_tokenizer, main_caches_first
from dstrain.tasks.common.tokenizer import prepare_tokenizer


@dataclass(frozen=True)
class PreparedData:
    """Data for training and evaluation.

    Attributes:
        description: sources and sizes of both splits, for the log.
        tokenizer: the named tokenizer, or one trained on the training split.
        train: samples to train on.
        validation: held-out samples; None if nothing was held out.
        collate: list of samples -> batch.
        tokens_per_byte: tokens per byte of the validation text, for bits per byte. None without
            validation text, and for conversations, whose loss covers a part of their tokens.
        conversations: row of the first held-out conversation; [] without one, None for text.
    """

    description: str
    tokenizer: Any
    train: Any
    validation: Any
    collate: Callable[[list[Any]], Any]
    tokens_per_byte: float | None = None
    conversations: Sequence[dict[str, str]] | None = None


def prepare_data(args: DataArguments, model_name: str | None, ranks: Ranks) -> PreparedData:
    """Read and tokenise the data, and make samples; one rank per machine does it, other ranks load.

    Raises:
        DataError: the data cannot be used, or differs between ranks.
    """
    prepared = (_chat if args.is_chat else _text)(args, model_name, ranks)
    parts = (prepared.train, prepared.validation)
    sizes = [len(part) if hasattr(part, "__len__") else None for part in parts]
    facts = (fingerprint_tokenizer(prepared.tokenizer), *sizes)
    require_equal("the prepared data", facts, DataError)
    return prepared


def _text(args: DataArguments, model_name: str | None, ranks: Ranks) -> PreparedData:
    """Prepare tokenizer, blocks and collator of text."""
    first = functools.partial(main_caches_first, ranks)
    documents = load_documents(args, main_first=first)
    tokenizer = _tokenizer(documents, args, model_name, ranks, lambda row: str(row["text"]))
    packed = prepare(documents, tokenizer, args, ranks=ranks, main_first=first)
    return PreparedData(
        documents.description,
        tokenizer,
        packed.train,
        packed.validation,
        functools.partial(collate_blocks, pad_token_id=_pad(tokenizer)),
        tokens_per_byte=packed.tokens_per_byte,
    )


def _chat(args: DataArguments, model_name: str | None, ranks: Ranks) -> PreparedData:
    """Prepare tokenizer, samples and collator of conversations."""
    first = functools.partial(main_caches_first, ranks)
    conversations = load_conversations(args, main_first=first)
    tokenizer = _tokenizer(conversations, args, model_name, ranks, _spoken)
    set_template(tokenizer, args)
    samples = prepare_chat(conversations, tokenizer, args, ranks=ranks, main_first=first)
    return PreparedData(
        conversations.description,
        tokenizer,
        samples.train,
        samples.validation,
        functools.partial(collate_conversations, pad_token_id=_pad(tokenizer)),
        conversations=list(islice(conversations.validation or (), 1)),
    )


def _tokenizer(
    documents: Documents,
    args: DataArguments,
    model_name: str | None,
    ranks: Ranks,
    text_of: Callable[[dict[str, Any]], str],
) -> Any:
    """Load the named tokenizer or that of the model, or train one on the documents."""
    return prepare_tokenizer(
        documents.train,
        name=args.tokenizer_name or model_name,
        vocab_size=args.vocab_size,
        fingerprint=documents.train_fingerprint,
        text_of=text_of,
        main_first=functools.partial(main_caches_first, ranks),
    )


def _spoken(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in messages_of(row))


def _pad(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
