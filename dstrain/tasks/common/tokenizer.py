"""Tokenizer of a task: a named one, or a byte-level BPE trained on the training data.

The trained tokenizer loses nothing of any text: it does not normalise, and starts from all 256
bytes, so that it needs no unknown token. Merges stay inside pre-tokens, which are chosen for code:
a word with at most one space or sign before it, a single digit, a run of signs, line breaks
together with the indentation after them, other white space. Keeping ``:`` and the line break apart
costs 5% more tokens than merging them, but a prompt that ends after ``:`` has the tokens that the
model has seen in training.

Special tokens: ``<|endoftext|>`` (0) ends every text and is BOS too, as in GPT-2. ``<|pad|>`` (1)
is another token, because collators that mask the labels of padding by its id would otherwise hide
every EOS from the loss. Sequence-to-sequence models start decoding from ``<|pad|>``, as T5 does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from datasets import Dataset, IterableDataset
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dstrain.core.errors import DataError, Problem, raise_problems
from dstrain.core.files import check_utf8
from dstrain.core.log import get_logger
from dstrain.tasks.common.cache import build_once, cache_folder

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SAMPLE_CHARACTERS = 32 * 1024 * 1024
"""Most text to train on, about 7 s on 2 cores. Of more text, documents are drawn at random."""
STREAM_SAMPLE_CHARACTERS = 8 * 1024 * 1024
"""Most text to train on of a stream: its start, which every rank reads."""
PRE_TOKENS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"""
_VERSION = 1  # of the trained tokenizer; raise it when the same text gives another one

_logger = get_logger(__name__)


def prepare_tokenizer(
    rows: Dataset | IterableDataset,
    *,
    name: str | None,
    vocab_size: int,
    fingerprint: str | None,
    text_of: Callable[[dict[str, Any]], str],
    adds_eos: bool = False,
    cache_dir: str | Path | None = None,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer called ``name``; without a name, train one on the data.

    A trained tokenizer is kept beside the prepared data, and found again for the same text and
    size. On a stream it is trained from the first rows.

    Args:
        rows: training data.
        name: folder or hub name of a tokenizer.
        vocab_size: size of a trained tokenizer.
        fingerprint: changes when ``rows`` do; None for a stream.
        text_of: returns the text of a row.
        adds_eos: let a trained tokenizer end every text with EOS.
        cache_dir: folder that keeps trained tokenizers; default ``HF_DATASETS_CACHE/dstrain``.
        main_first: returns a context in which the main rank of a machine runs before its other
            ranks, which then find the cache.

    Raises:
        DataError: the tokenizer cannot be loaded, or the cache cannot be written.
    """
    if name is not None:
        raise_problems(check_utf8("tokenizer_name", name), error=DataError)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            tokenizer("a")  # some damage shows only when it is used
            return tokenizer
        except Exception as error:
            raise DataError(
                Problem(
                    f"the tokenizer {name} could not be loaded",
                    str(error).strip() or type(error).__name__,
                    "check --tokenizer_name; without one and without a model, one is trained here",
                )
            ) from error
    with main_first():
        # On every rank: the texts themselves are the only fingerprint of a stream.
        texts: list[str] | None = None
        if fingerprint is None:
            texts = list(sample_texts(rows, text_of))
            fingerprint = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        facts = [_VERSION, fingerprint, vocab_size, SAMPLE_CHARACTERS, tokenizers.__version__]
        if adds_eos:
            facts.append("adds_eos")
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        folder = cache_folder(cache_dir) / f"tokenizer-{key}"

        def build(partial: Path) -> None:
            train_tokenizer(
                texts or sample_texts(rows, text_of), vocab_size, partial, adds_eos=adds_eos
            )

        build_once(folder, build)
        return AutoTokenizer.from_pretrained(str(folder))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, *, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts`` and save it to ``folder``.

    The same texts give the same tokenizer.

    Args:
        texts: texts to train on; 10 MB take about 2 s on 2 cores.
        vocab_size: number of entries, with the 2 special tokens and 256 bytes; it is smaller when
            the texts have too few pairs that occur twice.
        folder: receives ``tokenizer.json`` and the files that ``from_pretrained`` needs with it.
        adds_eos: let the tokenizer end every text with EOS, as sequence-to-sequence models need;
            the packer adds EOS to packed text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if adds_eos:
        ends = [(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END_OF_TEXT}",
            pair=f"$A {END_OF_TEXT} $B {END_OF_TEXT}",
            special_tokens=ends,
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(folder))
    return fast


def sample_texts(
    rows: Dataset | IterableDataset, text_of: Callable[[dict[str, Any]], str]
) -> Iterator[str]:
    """Yield texts to train the tokenizer on: all, or as many as the limit of characters allows.

    Beyond the limit rows are drawn at random, or for a stream the first rows are taken, and their
    number is logged.
    """
    characters = 0
    if isinstance(rows, Dataset):
        limit, total = SAMPLE_CHARACTERS, f"{len(rows):,}"
        order = np.random.default_rng(0).permutation(len(rows))
        texts = (text_of(rows[int(index)]) for index in order)
    else:
        limit, total = STREAM_SAMPLE_CHARACTERS, "streamed"
        texts = (text_of(row) for row in rows)
    for count, text in enumerate(texts, start=1):
        yield text[: limit - characters]
        characters += len(text)
        if characters >= limit:
            _logger.info("tokenizer trained on %s of the %s documents", f"{count:,}", total)
            return
