"""Arrays that grow batch by batch, in memory up to a limit and in files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstrain.evaluation.arena import Arena

PADDING = -100
"""Value that fills up shorter rows, as in transformers."""


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array on the host; float dtypes that numpy lacks become float32."""
    tensor = tensor.detach()
    if tensor.dtype.is_floating_point and tensor.dtype not in _NUMPY_FLOATS:
        tensor = tensor.float()
    return tensor.cpu().numpy()


_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def widest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the smallest shape of rows into which the rows of all these shapes fit.

    Shapes without rows (of padding batches) are ignored, as they may be wider than all others.
    """
    real = [shape for shape in shapes if shape[0]] or list(shapes)
    return tuple(max(sizes) for sizes in zip(*(shape[1:] for shape in real), strict=True))


def _are_even(shapes: Sequence[tuple[int, ...]], trailing: tuple[int, ...]) -> bool:
    """Tell whether all rows have the shape ``trailing``."""
    return all(shape[1:] == trailing for shape in shapes if shape[0])


class Column:
    """Blocks of rows [rows, ...] of a tensor in the predictions; blocks may differ in width."""

    def __init__(self, arena: Arena) -> None:
        """Set up without rows.

        Args:
            arena: allocates blocks in memory.
        """
        self._arena = arena
        self._shapes: list[tuple[int, ...]] = []
        self._blocks: list[np.ndarray] = []
        self._ends: list[int] = []  # number of blocks when each step was over
        self._file: Any = None
        self._dtype = np.dtype(np.float32)
        self.memory_bytes = 0

    def add(self, block: np.ndarray) -> None:
        """Append a copy of a block; an empty block sets dtype and width if it is the only one."""
        self._dtype = block.dtype
        self._shapes.append(block.shape)
        if self._file is None:
            self._blocks.append(self._arena.copied(block))
            self.memory_bytes += block.nbytes
        else:
            _write(self._file, block)

    def end_step(self) -> None:
        """Mark the blocks since the last call as one batch of all ranks."""
        self._ends.append(len(self._shapes))

    def spill(self, folder: Path) -> None:
        """Move the rows in memory to a file; later rows go there too."""
        self._file = _unnamed_file(folder)
        for block in self._blocks:
            _write(self._file, block)
        self._blocks, self.memory_bytes = [], 0

    @property
    def is_in_file(self) -> bool:
        """Tell whether the rows are in a file."""
        return self._file is not None

    def joined(self, folder: Path) -> np.ndarray:
        """Return all rows in an array, shorter ones padded at the end of every dimension.

        For rows in a file this is a writable memory map of an unnamed file. The column is empty
        afterwards.
        """
        trailing = widest(self._shapes)
        rows = sum(shape[0] for shape in self._shapes)
        even = _are_even(self._shapes, trailing)
        dtype = self._dtype if even else _with_padding(self._dtype)
        if self._file is None:
            return self._joined_in_memory((rows, *trailing), dtype)
        source, self._file = self._file, None
        with source:
            if even:
                return _mapped(source, dtype, (rows, *trailing))
            source.seek(0)
            with _unnamed_file(folder) as target:
                for shape in self._shapes:
                    count = int(np.prod(shape))
                    block = np.fromfile(source, self._dtype, count).reshape(shape)
                    _write(target, _padded(block, trailing, dtype))
                return _mapped(target, dtype, (rows, *trailing))

    def _joined_in_memory(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        whole = np.empty(shape, dtype)
        row = 0
        self._blocks.reverse()
        while self._blocks:  # freed one by one, so that memory never holds all rows twice
            block = self._blocks.pop()
            whole[row : row + len(block)] = _padded(block, shape[1:], dtype)
            row += len(block)
        return whole

    def separate(self) -> list[np.ndarray]:
        """Return an array per batch; the column is empty afterwards."""
        arrays, start = [], 0
        offset = 0
        for end in self._ends:
            shapes = self._shapes[start:end]
            trailing = widest(shapes) if shapes else self._shapes[0][1:]
            even = _are_even(shapes, trailing)
            rows = sum(shape[0] for shape in shapes)
            if self._file is not None and even and rows:
                whole = _mapped(self._file, self._dtype, (rows, *trailing), offset)
                offset += whole.nbytes
            else:
                blocks = self._blocks[start:end]
                if self._file is not None:
                    self._file.seek(offset)
                    blocks = [
                        np.fromfile(self._file, self._dtype, int(np.prod(s))).reshape(s)
                        for s in shapes
                    ]
                    offset += sum(block.nbytes for block in blocks)
                dtype = self._dtype if even else _with_padding(self._dtype)
                parts = [_padded(block, trailing, dtype) for block in blocks]
                whole = np.concatenate(parts) if parts else np.empty((0, *trailing), dtype)
            arrays.append(whole)
            start = end
        if self._file is not None:
            self._file.close()
        self._file, self._blocks = None, []
        return arrays


class Columns:
    """Columns of an evaluation, which share a limit of memory."""

    def __init__(self, number: int, *, memory_bytes: int, folder: Path) -> None:
        """Set up without rows.

        Args:
            number: number of columns.
            memory_bytes: most memory for all columns together.
            folder: folder for files of rows beyond that.
        """
        arena = Arena()
        self._columns = [Column(arena) for _ in range(number)]
        self._limit = memory_bytes
        self._folder = folder

    def add(self, index: int, tensor: torch.Tensor) -> None:
        """Append a block of rows to a column; move the largest columns to files if needed."""
        block, column = to_array(tensor), self._columns[index]

        def size_with_block(c: Column) -> int:
            return 0 if c.is_in_file else c.memory_bytes + (block.nbytes if c is column else 0)

        while sum(map(size_with_block, self._columns)) > self._limit:
            max(self._columns, key=size_with_block).spill(self._folder)
        column.add(block)

    def end_step(self) -> None:
        """Mark a batch of all ranks as complete."""
        for column in self._columns:
            column.end_step()

    def finish(self, *, concat: bool) -> list[Any]:
        """Return for each column an array, or a list of an array per batch; empty the columns."""
        if concat:
            return [column.joined(self._folder) for column in self._columns]
        return [column.separate() for column in self._columns]


def join(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate blocks of rows, with shorter rows padded."""
    trailing = widest([tuple(block.shape) for block in blocks])
    blocks = [block for block in blocks if len(block)] or list(blocks[:1])
    if all(tuple(block.shape[1:]) == trailing for block in blocks):
        return torch.cat(list(blocks)) if len(blocks) > 1 else blocks[0]
    dtype = blocks[0].dtype
    if dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        dtype = torch.int64
    rows = sum(len(block) for block in blocks)
    whole = torch.full((rows, *trailing), PADDING, dtype=dtype)
    row = 0
    for block in blocks:
        place = (slice(row, row + len(block)), *(slice(size) for size in block.shape[1:]))
        whole[place] = block.to(dtype)
        row += len(block)
    return whole


def _padded(block: np.ndarray, trailing: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if block.shape[1:] == trailing:
        return block.astype(dtype, copy=False)
    if not len(block):
        return np.empty((0, *trailing), dtype)
    whole = np.full((len(block), *trailing), PADDING, dtype)
    whole[(slice(None), *(slice(size) for size in block.shape[1:]))] = block
    return whole


def _with_padding(dtype: np.dtype) -> np.dtype:
    """Return a dtype that can hold both the values and the padding."""
    return np.dtype(np.int64) if dtype.kind in "bu" else dtype


def _unnamed_file(folder: Path) -> Any:
    """Open a file without a name, which the system removes when the process closes it or dies."""
    return tempfile.TemporaryFile(dir=folder, prefix=".predictions-")


def _write(file: Any, block: np.ndarray) -> None:
    if block.size:
        file.write(np.ascontiguousarray(block).data.cast("B"))


def _mapped(file: Any, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
    if not np.prod(shape):
        return np.empty(shape, dtype)
    file.flush()
    return np.memmap(file, dtype, "r+", offset, shape)
