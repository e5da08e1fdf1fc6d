"""Samples from documents: tokenise, join, cut into blocks, put into batches.

The documents of a split are joined in order, each followed by EOS (and preceded by BOS if the
tokenizer adds it by itself). Their tokens are cut into blocks of ``block_size`` tokens. The last
block may be shorter; with a single token, which predicts nothing, it is left out. A sample is
``{"input_ids": int64 array, shape (block_size,) or shorter}``; ``collate_blocks`` adds labels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem
from dstrain.data import Resumable

STREAM_BATCH_CHARACTERS = 256 * 1024
"""Text of a stream that is tokenised at once: little, so that the first block comes soon."""
STREAM_MEASURED_DOCUMENTS = 1000
"""Documents of a streamed validation split in which tokens per byte are counted."""
_READ_ROWS = 64


def collate_blocks(
    samples: Sequence[dict[str, Any]], *, pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """Make a batch of samples, padded on the right to the longest of them.

    Returns:
        ``input_ids`` and ``labels``, both int64 of shape (batch, length), labels -100 on padding
        and not shifted, which the model does. If a sample is padded, also ``attention_mask``, int64
        of the same shape; without it attention of full blocks is faster.
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
    """Packer of texts into blocks; it keeps the tokens that do not fill a block yet.

    Attributes:
        num_tokens: tokens of all texts so far, with EOS (and BOS if it is added).
        num_bytes: UTF-8 bytes of these texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        held: Sequence[int] = (),
    ) -> None:
        """Begin with the tokens ``held``, the ``rest`` of an earlier packer.

        Special tokens that surround a document are found by tokenising an empty text.
        """
        self.num_tokens = 0
        self.num_bytes = 0
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._held = np.array(held, dtype=np.int32)
        added = tokenizer("", verbose=False)["input_ids"]
        bos = tokenizer.bos_token_id
        self._start = [bos] if added and bos is not None and added[0] == bos else []
        if self._start == [tokenizer.eos_token_id]:
            self._start = []  # the EOS of the document before serves as BOS

    def add(self, texts: Sequence[str]) -> np.ndarray:
        """Add texts; return the blocks that became full: int32, shape (num_blocks, block_size)."""
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
        """Return the tokens after the last full block: int32, shape (fewer than block_size,)."""
        return self._held


@dataclass(frozen=True)
class _Place:
    """Position in a stream after a block, from which a resumed stream makes the next block.

    A block is cut from the tokens left over from earlier batches of texts and those of one batch.

    Attributes:
        rows: state of the rows at a read before that batch; None for the beginning of the rows.
        texts: texts between that read and the batch.
        held: tokens left over from earlier batches.
        cut: blocks cut so far from ``held`` and the batch.
        blocks: blocks since the beginning of the stream.
        block_size: tokens of a block.
    """

    rows: dict[str, Any] | None
    texts: int
    held: list[int]
    cut: int
    blocks: int
    block_size: int


class PackedStream(torch.utils.data.IterableDataset):
    """Stream of blocks, made from a stream of documents while that is read.

    Each iteration begins at the start and gives the same blocks in the same order. In a
    ``DataLoader`` with workers the first worker reads everything and the others end at once: a
    block depends on all tokens before it, so that other workers would repeat the work of the first.

    If the stream of documents knows its position, so does this one: a resumed run reads and
    tokenises at most one batch of texts again.
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
        """Keep the rows and how to cut them; rows are read by iterating only.

        Args:
            rows: documents, with a column ``text``.
            tokenizer: tokenizer of the documents.
            block_size: tokens of a block.
            max_blocks: blocks after which an iteration ends; None for all of them.
        """
        self.block_size = block_size
        self.max_blocks = max_blocks
        self._rows = rows
        self._tokenizer = tokenizer
        self._place: _Place | None = None  # of the last block, if it is known
        self._begin: _Place | None = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the position of the latest iteration; None if that of its documents is unknown."""
        return None if self._place is None else dict(vars(self._place))

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Let the next iteration, and no later one, begin after the block at ``state``.

        Returns:
            False if ``state`` belongs to other documents or to another ``block_size``.
        """
        place, rows = _Place(**state), Resumable.of(self._rows)
        if place.block_size != self.block_size or rows is None:
            return False
        if place.rows is not None and not rows.load(place.rows):
            return False
        self._begin = place
        return True

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Iterate over samples ``{"input_ids": (block_size,)}``; the last one may be shorter."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id > 0:
            return iter(())
        begin, self._begin, self._place = self._begin, None, None
        limit = self.max_blocks
        if begin is not None and limit is not None:
            limit = max(0, limit - begin.blocks)
        return islice(self._blocks(begin), limit)

    def measure_tokens_per_byte(self) -> float:
        """Return tokens per UTF-8 byte in the first ``STREAM_MEASURED_DOCUMENTS`` documents."""
        packer = Packer(self._tokenizer, self.block_size)
        texts = islice(read_texts(self._rows), STREAM_MEASURED_DOCUMENTS)
        for batch in in_batches(texts, STREAM_BATCH_CHARACTERS):
            packer.add(batch)
        return packer.num_tokens / packer.num_bytes

    def _blocks(self, begin: _Place | None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the samples behind a position; keep the position of each."""
        places: deque[tuple[dict[str, Any] | None, int]] = deque()
        rows = Resumable.of(self._rows)
        texts = read_texts(self._rows) if rows is None else _placed_texts(rows, begin, places)
        packer = Packer(self._tokenizer, self.block_size, held=begin.held if begin else ())
        done, total = (begin.cut, begin.blocks) if begin else (0, 0)
        for batch in in_batches(texts, STREAM_BATCH_CHARACTERS):
            held = packer.rest().tolist()
            for cut, block in enumerate(packer.add(batch).astype(np.int64), start=1):
                if cut <= done:
                    continue
                total += 1
                if rows is not None:
                    self._place = _Place(*places[0], held, cut, total, self.block_size)
                yield {"input_ids": block}
            done = 0
            places.clear()
        self._place = None
        if len(packer.rest()) >= 2:
            yield {"input_ids": packer.rest().astype(np.int64)}


def _placed_texts(
    rows: Resumable, begin: _Place | None, places: deque[tuple[dict[str, Any] | None, int]]
) -> Iterator[str]:
    """Yield the texts of ``rows`` from ``begin`` on; append the position of each to ``places``.

    A position is the state of ``rows`` at a read, and the number of texts between it and the text.
    """
    state, used = (begin.rows, begin.texts) if begin else (None, 0)
    begins_inside = state is not None and rows.load(state)
    for batch in rows.source.iter(_READ_ROWS):
        if begins_inside:
            rows.begun()
            begins_inside = False
        for index, text in enumerate(batch["text"]):
            if index >= used:
                places.append((state, index))
                yield text
        used = 0
        state = rows.state()


def read_texts(rows: Dataset | IterableDataset) -> Iterator[str]:
    """Yield the texts of a split, one by one."""
    # iter() gives every row in every worker process of a DataLoader; __iter__ shares them out.
    for batch in rows.iter(_READ_ROWS):
        yield from batch["text"]


def in_batches(texts: Iterable[str], num_characters: int) -> Iterator[list[str]]:
    """Yield texts in lists, each as soon as it has ``num_characters`` characters or more."""
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


def too_short(name: str) -> DataError:
    """Return the error for a split that is too short for a sample."""
    return DataError(
        Problem(
            f"the {name} text has fewer than 2 tokens",
            "a sample needs a token to read and one to predict",
            "give more text" + (" or --validation_percentage 0" if name == "validation" else ""),
        )
    )
