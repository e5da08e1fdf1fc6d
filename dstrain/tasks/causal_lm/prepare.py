"""Splits as packed samples.

A map-style split is tokenised once per machine, and memory-mapped from then on. A streamed split is
tokenised while it is read, by one process, and gives the same blocks in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import Ranks
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.packing import (
    PackedStream,
    Packer,
    in_batches,
    read_texts,
    too_short,
)
from dstrain.tasks.causal_lm.sources import Documents
from dstrain.tasks.common.cache import build_once, cache_folder, fingerprint_tokenizer

BATCH_CHARACTERS = 4 * 1024 * 1024
"""Text that is tokenised at once on its way to disk: enough for all threads, little memory."""
_VERSION = 1  # of the files of blocks; raise it when the same input gives other blocks


@dataclass(frozen=True)
class BlockFacts:
    """Counts of one packed split.

    Attributes:
        num_blocks: number of blocks, which are the samples.
        num_tokens: tokens in all blocks.
        tokens_per_byte: tokens, special ones included, per UTF-8 byte of the documents.
    """

    num_blocks: int
    num_tokens: int
    tokens_per_byte: float


@dataclass(frozen=True)
class PackedData:
    """Samples of both splits.

    Attributes:
        train: memory-mapped training samples, or a ``PackedStream`` of them.
        validation: memory-mapped or streamed validation samples; None if nothing was held out.
        tokens_per_byte: tokens per byte of the validation split, for bits per byte, which are
            loss / ln 2 * tokens_per_byte. Exact for map-style data (in the documents of the
            samples); counted in the first 1,000 documents of a stream. None without a validation
            split.
        train_facts: counts of ``train``; None for a stream.
        validation_facts: counts of ``validation``; None for a stream.
        from_cache: whether both splits were found in the cache.
    """

    train: Dataset | PackedStream
    validation: Dataset | PackedStream | None
    tokens_per_byte: float | None
    train_facts: BlockFacts | None
    validation_facts: BlockFacts | None
    from_cache: bool


def prepare(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    *,
    cache_dir: str | Path | None = None,
    ranks: Ranks | None = None,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PackedData:
    """Tokenise and pack both splits of ``documents``, or load the blocks of an earlier run.

    Args:
        documents: texts, from ``sources.load_documents``.
        tokenizer: any tokenizer with an EOS token.
        args: ``block_size``, ``max_train_samples`` and ``max_eval_samples`` are used.
        cache_dir: folder that keeps packed splits; default ``HF_DATASETS_CACHE/dstrain``.
        ranks: ranks of this run; the main rank shows a progress bar.
        main_first: returns a context in which the main rank of a machine runs before its other
            ranks, which then find the cache.

    Raises:
        DataError: the tokenizer has no EOS token, a split has fewer than 2 tokens, or the cache
            cannot be written.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise DataError(
            Problem(
                f"the tokenizer {name} has no EOS token",
                "every document ends with it",
                "set tokenizer.eos_token, or use the tokenizer of a causal language model",
            )
        )
    root, bar = cache_folder(cache_dir), ranks is None or ranks.is_main

    def pack(
        name: str, rows: Dataset | IterableDataset, fingerprint: str | None, limit: int | None
    ) -> _Split:
        if isinstance(rows, IterableDataset):
            stream = PackedStream(rows, tokenizer, args.block_size, max_blocks=limit)
            if next(iter(stream), None) is None:
                raise too_short(name)
            return _Split(stream, None, False)
        key = _key(fingerprint or rows._fingerprint, tokenizer, args.block_size, limit)
        blocks = _BlockFile(rows, Packer(tokenizer, args.block_size), limit, name, bar)
        built = build_once(root / f"packed-{key}", blocks.write)
        return _open_blocks(root / f"packed-{key}", built)

    with main_first():
        train = pack("train", documents.train, documents.train_fingerprint, args.max_train_samples)
        held_out = (
            None
            if documents.validation is None
            else pack(
                "validation",
                documents.validation,
                documents.validation_fingerprint,
                args.max_eval_samples,
            )
        )
    return PackedData(
        train=train.samples,
        validation=held_out.samples if held_out else None,
        tokens_per_byte=_tokens_per_byte(held_out) if held_out else None,
        train_facts=train.facts,
        validation_facts=held_out.facts if held_out else None,
        from_cache=train.from_cache and (held_out is None or held_out.from_cache),
    )


def _tokens_per_byte(split: _Split) -> float:
    if isinstance(split.samples, PackedStream):
        return split.samples.measure_tokens_per_byte()
    assert split.facts is not None
    return split.facts.tokens_per_byte


@dataclass(frozen=True)
class _Split:
    samples: Dataset | PackedStream
    facts: BlockFacts | None
    from_cache: bool


@dataclass(frozen=True)
class _BlockFile:
    """Writer of the blocks of one split to files of a folder: ``blocks.arrow``, ``facts.json``."""

    rows: Dataset
    packer: Packer
    max_blocks: int | None
    name: str
    show_progress: bool

    def write(self, folder: Path) -> None:
        """Write all blocks, or the first ``max_blocks``, to files in a folder."""
        schema = pa.schema({"input_ids": pa.list_(pa.int32())})
        num_blocks = num_tokens = 0
        path = folder / "blocks.arrow"
        bar = tqdm(
            total=len(self.rows),
            desc=f"Tokenising {self.name}",
            unit="doc",
            disable=not self.show_progress,
        )
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer, bar:
            for blocks in self._blocks(bar):
                kept = blocks[: None if self.max_blocks is None else self.max_blocks - num_blocks]
                num_blocks += len(kept)
                num_tokens += kept.size
                # Offsets of equal rows: 0, n, 2n, ... for shape (num_blocks, n).
                offsets = np.arange(len(kept) + 1, dtype=np.int32) * np.int32(kept.shape[1])
                column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(kept.reshape(-1)))
                writer.write_batch(pa.record_batch([column], schema=schema))
                if num_blocks == self.max_blocks:
                    break
        if not num_blocks:
            raise too_short(self.name)
        tokens_per_byte = self.packer.num_tokens / self.packer.num_bytes
        facts = BlockFacts(num_blocks, num_tokens, tokens_per_byte)
        (folder / "facts.json").write_text(json.dumps(asdict(facts)))

    def _blocks(self, bar: tqdm) -> Iterator[np.ndarray]:
        """Yield blocks, shape (num_blocks, length); the last may be shorter than the others."""
        for batch in in_batches(read_texts(self.rows), BATCH_CHARACTERS):
            blocks = self.packer.add(batch)
            bar.update(len(batch))
            if len(blocks):
                yield blocks
        if len(self.packer.rest()) >= 2:
            yield self.packer.rest().reshape(1, -1)


def _open_blocks(folder: Path, built: bool) -> _Split:
    samples = Dataset.from_file(str(folder / "blocks.arrow")).with_format("numpy")
    facts = BlockFacts(**json.loads((folder / "facts.json").read_text()))
    return _Split(samples, facts, not built)


def _key(
    fingerprint: str, tokenizer: PreTrainedTokenizerBase, block_size: int, limit: int | None
) -> str:
    """Return the name of the cached blocks of a split: a hash of all that decides them."""
    facts = [
        _VERSION,
        fingerprint,
        fingerprint_tokenizer(tokenizer),
        block_size,
        limit,
        tokenizers.__version__,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
