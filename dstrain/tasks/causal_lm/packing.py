"""Documents to samples: tokenise, join, cut into blocks, keep on disk, put into batches.

The token stream of a split is its documents in order, each followed by EOS (and preceded by BOS
where the tokenizer itself adds one). It is cut every ``block_size`` tokens; the last block is
shorter, and is left out only when it has a single token, which would predict nothing. A sample is
``{"input_ids": int64 array, shape (block_size,) or shorter}``; ``collate_blocks`` adds the rest.

Map-style splits are tokenised once per machine and memory-mapped after that. A streamed split is
tokenised while it is read, gives the same blocks in the same order, and is read by one process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import torch
from datasets import Dataset, IterableDataset
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import Ranks
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.sources import Documents

BATCH_CHARACTERS = 4 * 1024 * 1024
"""Text tokenised at once on the way to disk: enough for every thread, small in memory."""
STREAM_BATCH_CHARACTERS = 256 * 1024
"""The same for a stream, where the first block should come soon."""
STREAM_MEASURED_DOCUMENTS = 1000
"""Documents of a streamed validation split from which its tokens per byte are measured."""
_READ_ROWS = 64
_VERSION = 1  # of this module's output; raise it when the same input gives other blocks


@dataclass(frozen=True)
class BlockFacts:
    """What is known of one packed split.

    Attributes:
        num_blocks: samples.
        num_tokens: tokens in them.
        tokens_per_byte: tokens per UTF-8 byte of the documents tokenised, special tokens included.
    """

    num_blocks: int
    num_tokens: int
    tokens_per_byte: float


@dataclass(frozen=True)
class PackedData:
    """Samples of both splits, ready for a loader.

    Attributes:
        train: memory-mapped samples, or a ``PackedStream``.
        validation: the same, or None when nothing was held out.
        tokens_per_byte: of the validation split, for bits per byte: loss / ln 2 * tokens_per_byte.
            Exact for map-style data (over the documents that make up the samples); of a streamed
            split measured on its first 1,000 documents. None without validation data.
        train_facts: counts of ``train``; None for a stream.
        validation_facts: counts of ``validation``; None for a stream.
        from_cache: whether nothing had to be tokenised.
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
    """Tokenise and pack both splits of ``documents``, or find them packed by an earlier run.

    Args:
        documents: raw text, from ``sources.load_documents``.
        tokenizer: any tokenizer with an EOS token.
        args: ``block_size``, ``max_train_samples`` and ``max_eval_samples`` are read.
        cache_dir: where packed splits are kept; default ``HF_DATASETS_CACHE/dstrain``.
        ranks: who shows a progress bar (the main rank).
        main_first: called for a context in which the main rank of a machine runs before the
            others, which then find its cache.

    Raises:
        DataError: for a tokenizer without EOS, a split of fewer than 2 tokens, or a cache folder
            that cannot be written.
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
                raise _too_short(name)
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


def collate_blocks(
    samples: Sequence[dict[str, Any]], *, pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of samples, padded on the right to the longest of them.

    Returns:
        ``input_ids`` and ``labels``, both int64 of shape (batch, length), labels -100 on padding
        (shifting them is the model's part); and only where something was padded
        ``attention_mask``, int64 of the same shape, so that full blocks take the mask-free path.
    """
    rows = [np.asarray(sample["input_ids"], dtype=np.int64) for sample in samples]
    length = max(map(len, rows))
    if all(len(row) == length for row in rows):
        input_ids = torch.from_numpy(np.stack(rows))
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), -100, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.from_numpy(row.copy())
        input_ids[index, : len(row)] = tokens
        labels[index, : len(row)] = tokens
        attention_mask[index, : len(row)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


class Packer:
    """Turns texts into blocks; holds the tokens that do not fill a block yet.

    Attributes:
        num_tokens: tokens of all texts so far, with EOS (and BOS where it is added).
        num_bytes: UTF-8 bytes of those texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        """Learn which special tokens surround a document."""
        self.num_tokens = 0
        self.num_bytes = 0
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._held = np.empty(0, dtype=np.int32)
        added = tokenizer("", verbose=False)["input_ids"]
        bos = tokenizer.bos_token_id
        self._start = [bos] if added and bos is not None and added[0] == bos else []
        if self._start == [tokenizer.eos_token_id]:
            self._start = []  # the EOS of the document before it is already there

    def add(self, texts: Sequence[str]) -> np.ndarray:
        """Blocks that are full after ``texts``: int32, shape (num_blocks, block_size)."""
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        pieces = [self._held]
        end = [self._tokenizer.eos_token_id]
        for tokens in encoded:
            pieces.append(np.array([*self._start, *tokens, *end], dtype=np.int32))
        self.num_tokens += sum(map(len, pieces[1:]))
        self.num_bytes += sum(len(text.encode("utf-8")) for text in texts)
        tokens = np.concatenate(pieces)
        full = len(tokens) - len(tokens) % self._block_size
        self._held = tokens[full:].copy()
        return tokens[:full].reshape(-1, self._block_size)

    def rest(self) -> np.ndarray:
        """The tokens after the last full block: int32, shape (fewer than block_size,)."""
        return self._held


class PackedStream(torch.utils.data.IterableDataset):
    """Blocks of a stream of documents, tokenised while they are read.

    Iterating again starts again and gives the same blocks in the same order. Under a ``DataLoader``
    with workers the first worker reads everything and the others end at once: cutting blocks needs
    every token before them, so more workers than ``max_workers`` could only repeat its work.
    """

    max_workers = 1

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        max_blocks: int | None = None,
    ) -> None:
        """Keep what to read; nothing is read before iteration."""
        self.block_size = block_size
        self.max_blocks = max_blocks
        self._rows = rows
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Samples ``{"input_ids": int64 (block_size,)}``, the last one possibly shorter."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id > 0:
            return iter(())
        return islice(self._blocks(), self.max_blocks)

    def measure_tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte of the first ``STREAM_MEASURED_DOCUMENTS`` documents."""
        packer = Packer(self._tokenizer, self.block_size)
        texts = islice(_texts(self._rows), STREAM_MEASURED_DOCUMENTS)
        for batch in _batches(texts, STREAM_BATCH_CHARACTERS):
            packer.add(batch)
        return packer.num_tokens / packer.num_bytes

    def _blocks(self) -> Iterator[dict[str, np.ndarray]]:
        packer = Packer(self._tokenizer, self.block_size)
        for batch in _batches(_texts(self._rows), STREAM_BATCH_CHARACTERS):
            for block in packer.add(batch).astype(np.int64):
                yield {"input_ids": block}
        if len(packer.rest()) >= 2:
            yield {"input_ids": packer.rest().astype(np.int64)}


# --- what is kept on disk ------------------------------------------------------------------------


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder that keeps packed splits and trained tokenizers."""
    return Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "dstrain").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make ``folder`` by ``build`` unless it exists; True when it was made now.

    ``build`` writes into a temporary folder beside it, which is renamed when complete, so a killed
    process leaves nothing that looks finished; the next one removes what it left. A file lock,
    which the system releases with its process, makes runs that want the same folder take turns.

    Raises:
        DataError: when the cache cannot be written, and whatever ``build`` raises.
    """
    if folder.is_dir():
        return False
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():
                return False
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            Problem(
                f"the data cache {folder.parent} cannot be written",
                str(error),
                "set HF_DATASETS_CACHE to a folder with space that you may write",
            )
        ) from error
    return True


@dataclass(frozen=True)
class _Split:
    samples: Dataset | PackedStream
    facts: BlockFacts | None
    from_cache: bool


@dataclass(frozen=True)
class _BlockFile:
    """Writes the blocks of one split into a folder: ``blocks.arrow`` and ``facts.json``."""

    rows: Dataset
    packer: Packer
    max_blocks: int | None
    name: str
    show_progress: bool

    def write(self, folder: Path) -> None:
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
            raise _too_short(self.name)
        tokens_per_byte = self.packer.num_tokens / self.packer.num_bytes
        facts = BlockFacts(num_blocks, num_tokens, tokens_per_byte)
        (folder / "facts.json").write_text(json.dumps(asdict(facts)))

    def _blocks(self, bar: tqdm) -> Iterator[np.ndarray]:
        for batch in _batches(_texts(self.rows), BATCH_CHARACTERS):
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
    facts = [
        _VERSION,
        fingerprint,
        fingerprint_tokenizer(tokenizer),
        block_size,
        limit,
        tokenizers.__version__,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how ``tokenizer`` encodes a document."""
    facts: dict[str, Any] = {
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        facts["backend"] = json.loads(backend.to_str())
        # Left over from the last call, and set again by the next one.
        facts["backend"].pop("truncation", None)
        facts["backend"].pop("padding", None)
    else:
        facts["class"] = type(tokenizer).__name__
        facts["vocabulary"] = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# --- reading texts -------------------------------------------------------------------------------


def _texts(rows: Dataset | IterableDataset) -> Iterator[str]:
    # iter(), unlike __iter__, gives every row in every worker process of a DataLoader.
    for batch in rows.iter(_READ_ROWS):
        yield from batch["text"]


def _batches(texts: Iterable[str], num_characters: int) -> Iterator[list[str]]:
    """Lists of texts of about ``num_characters`` characters together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= num_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _too_short(name: str) -> DataError:
    return DataError(
        Problem(
            f"the {name} text has fewer than 2 tokens",
            "a sample needs a token to read and one to predict",
            "give more text" + (" or --validation_percentage 0" if name == "validation" else ""),
        )
    )
