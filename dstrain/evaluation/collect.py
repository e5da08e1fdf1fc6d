"""Collection of all ranks' predictions on rank 0, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstrain.core.errors import DataError, Problem
from dstrain.evaluation.arena import Heap
from dstrain.evaluation.columns import Columns, join, to_array
from dstrain.evaluation.loop import EvalBatch, Prediction
from dstrain.evaluation.nested import Layout, take_apart
from dstrain.evaluation.transport import Transport, storage_error

_PARTS = ("predictions", "labels", "inputs", "losses")


@dataclass(frozen=True)
class Collected:
    """Collected results of forward passes on all ranks, nested as the model returned them.

    Attributes:
        predictions: the model's outputs.
        labels: the labels, or None.
        inputs: the main input, or None.
        losses: for each sample the mean loss of its batch, or None.
    """

    predictions: Any = None
    labels: Any = None
    inputs: Any = None
    losses: Any = None


@dataclass(frozen=True)
class PredictionOptions:
    """Options for collecting predictions.

    Attributes:
        keep: keep predictions of all batches; False only passes each batch to ``on_batch``.
        concat: return an array over all batches; False returns a list with an array per batch.
        every: number of batches that stay on the accelerator before they move to the host.
        losses: collect losses of samples too.
        objects: pickle predictions that are no tensors; False makes them an error.
        memory_bytes: most memory for all arrays on rank 0; arrays beyond it are kept in files.
        folder: folder for these files.
    """

    folder: Path
    keep: bool = True
    concat: bool = True
    every: int = 1
    losses: bool = False
    objects: bool = False
    memory_bytes: int = 2**26


class Collector:
    """Collector of predictions, which sends each batch of this rank to rank 0.

    All ranks call ``add`` equally often, with padding batches where they have no sample.
    """

    def __init__(
        self,
        transport: Transport,
        keeping: PredictionOptions,
        *,
        on_batch: Callable[[Collected, bool], None] | None = None,
    ) -> None:
        """Set up without predictions.

        Args:
            transport: sends predictions to rank 0.
            keeping: options for collecting.
            on_batch: called on rank 0 with each batch of all ranks, as tensors on the host, and a
                flag that it is the last.
        """
        self._transport = transport
        self._keeping = keeping
        self._on_batch = on_batch
        self._pending: list[tuple[EvalBatch, Prediction | None]] = []
        self._layouts: tuple[Layout, ...] | None = None
        self._formats: list[tuple[Any, int]] = []  # type and number of dimensions of each leaf
        self._columns: Columns | None = None
        self._objects: dict[int, list[list[Any]]] = {}  # leaf -> objects of each batch
        self._failure: Exception | None = None
        self._heap = Heap()

    def add(self, batch: EvalBatch, prediction: Prediction | None) -> None:
        """Add the results of a forward pass; after ``fail`` only take part in sending.

        Raises:
            DataError: the results cannot be joined with those of other ranks or batches; raised on
                all ranks.
            Exception: ``on_batch`` raised it on rank 0, or a rank passed it to ``fail``; raised on
                all ranks.
        """
        self._pending.append((batch, prediction))
        if len(self._pending) >= self._keeping.every or batch.is_last:
            pending, self._pending = self._pending, []
            pending.reverse()
            while pending:
                self._send(*pending.pop())

    @property
    def has_sent_all(self) -> bool:
        """Tell whether all batches were sent to rank 0; the same on all ranks."""
        return not self._pending

    def fail(self, error: Exception) -> None:
        """Store this rank's error, to raise it on all ranks at the next sending or ``finish``."""
        self._failure = self._failure or error

    def abort(self, error: Exception) -> None:
        """Raise this rank's error on all ranks, instead of sending a batch.

        Other ranks get the error when they send their batch; otherwise they would wait for this
        rank.

        Raises:
            Exception: the error.
        """
        if self._layouts is not None:
            self._transport.headers(self._shape_numbers((), failed=True), failed=True)
        self._transport.raise_together(error)

    def finish(self) -> Collected:
        """Return all predictions as arrays on rank 0, and arrays without rows on other ranks.

        Raises:
            TrainingError: predictions could not be written to disk; raised on all ranks.
            Exception: ``on_batch`` raised it on rank 0; raised on all ranks.
        """
        self._transport.raise_together(self._failure)
        if self._layouts is None or not self._keeping.keep:
            return Collected()
        leaves: list[Any] = []
        error: Exception | None = None
        if self._transport.is_main:
            assert self._columns is not None
            try:
                leaves = self._columns.finish(concat=self._keeping.concat)
            except OSError as caught:
                error = storage_error(caught)
            for index, batches in self._objects.items():
                flat = [entry for entries in batches for entry in entries]
                leaves[index] = flat if self._keeping.concat else batches
        self._transport.raise_together(error)
        kinds = self._transport.from_main(lambda: [_kind_of(leaf) for leaf in leaves])
        if not self._transport.is_main:
            leaves = [_without_rows(kind) for kind in kinds]
        return self._nest(leaves, batches=not self._keeping.concat)

    def _nest(self, leaves: Sequence[Any], *, batches: bool = False) -> Collected:
        """Restore the nested parts from leaves; with ``batches``, each as a list of batches."""
        assert self._layouts is not None
        parts, start = [], 0
        for layout in self._layouts:
            count = _leaves_of(layout)
            mine = leaves[start : start + count]
            start += count
            if batches and count:
                parts.append([layout.fill(iter(step)) for step in zip(*mine, strict=True)])
            else:
                parts.append(layout.fill(iter(mine)))
        return Collected(**dict(zip(_PARTS, parts, strict=True)))

    def _send(self, batch: EvalBatch, prediction: Prediction | None) -> None:
        """Send a batch to rank 0; if a rank cannot, raise its error on all ranks."""
        leaves: list[Any] = []
        packed: list[bytes | None] = []
        failed = self._failure
        if prediction is not None:
            try:
                layouts, leaves = self._take_apart(batch, prediction)
                formats = [_format_of(leaf) for leaf in leaves]
                if self._layouts is not None:
                    self._check_same(layouts, formats)
                packed = [self._transport.packed(n) for n in leaves if isinstance(n, list)]
            except DataError as error:
                failed = failed or error
        del prediction
        if self._layouts is None:
            self._transport.raise_together(failed)
            self._agree(layouts, formats)
        numbers = self._shape_numbers(leaves, failed=failed is not None)
        rows = self._transport.headers(numbers, failed=failed is not None)
        if rows is None:
            self._transport.raise_together(failed)
        assert rows is not None
        shapes = [self._shapes_of(row) for row in rows]
        joined: list[Any] = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, list):
                entries = self._transport.objects_to_main(leaf, packed.pop(0))
                if self._keeping.keep:
                    self._objects.setdefault(index, []).append(entries)
                joined.append(entries)
                continue
            blocks = self._transport.to_main(leaf, [s[index] for s in shapes])
            leaves[index] = None
            joined.append(self._store(index, blocks))
        if self._transport.is_main:
            self._end_batch(joined, is_last=batch.is_last)
        self._heap.release()

    def _take_apart(
        self, batch: EvalBatch, prediction: Prediction
    ) -> tuple[tuple[Layout, ...], list[Any]]:
        losses = None
        if self._keeping.losses and prediction.loss is not None:
            losses = torch.as_tensor(prediction.loss).detach().mean().repeat(batch.num_samples)
        values = (prediction.predictions, prediction.labels, prediction.inputs, losses)
        layouts, leaves = [], []
        for name, value in zip(_PARTS, values, strict=True):
            layout, found = take_apart(value, name, objects=self._keeping.objects)
            layouts.append(layout)
            leaves += found
        if not batch.num_samples:
            leaves = [leaf[:0] for leaf in leaves]
        return tuple(layouts), [_on_host(leaf) for leaf in leaves]

    def _agree(self, layouts: tuple[Layout, ...], formats: list[tuple[Any, int]]) -> None:
        """Check at the first batch that all ranks' predictions are nested alike; a collective."""
        every_rank = self._transport.agree((layouts, formats))
        for rank, theirs in enumerate(every_rank):
            if theirs != every_rank[0]:
                raise _different(f"rank {rank}", "rank 0", theirs[0], every_rank[0][0])
        self._layouts, self._formats = layouts, formats
        if self._transport.is_main:
            keeping = self._keeping
            self._columns = Columns(
                len(formats), memory_bytes=keeping.memory_bytes, folder=keeping.folder
            )

    def _check_same(self, layouts: tuple[Layout, ...], formats: list[tuple[Any, int]]) -> None:
        assert self._layouts is not None
        if layouts != self._layouts or formats != self._formats:
            raise _different("a batch", "the first batch", layouts, self._layouts)

    def _shape_numbers(self, leaves: Sequence[Any], *, failed: bool) -> list[int]:
        if failed:
            return [0] * sum(dimensions for _, dimensions in self._formats)
        return [n for leaf in leaves if not isinstance(leaf, list) for n in leaf.shape]

    def _shapes_of(self, numbers: list[int]) -> list[tuple[int, ...]]:
        shapes, start = [], 0
        for _, dimensions in self._formats:
            shapes.append(tuple(numbers[start : start + dimensions]))
            start += dimensions
        return shapes

    def _store(self, index: int, blocks: Iterator[torch.Tensor]) -> torch.Tensor | None:
        """Store the blocks of a tensor from all ranks on rank 0; join them for ``on_batch``."""
        joined = None
        if self._on_batch and self._transport.is_main:  # blocks of other ranks are overwritten
            joined = join([b.clone() if rank else b for rank, b in enumerate(blocks)])
        for block in blocks if joined is None else [joined]:
            # After a failure blocks of other ranks are still received, until all ranks raise it.
            if not self._keeping.keep or self._failure is not None:
                continue
            assert self._columns is not None
            try:
                self._columns.add(index, block)
            except OSError as error:
                self._failure = storage_error(error)
        return joined

    def _end_batch(self, joined: list[Any], *, is_last: bool) -> None:
        assert self._columns is not None
        self._columns.end_step()
        if self._on_batch is None or self._failure is not None:
            return
        try:
            self._on_batch(self._nest(joined), is_last)
        except Exception as error:  # user code; raised on all ranks at the next batch
            self._failure = error


def _leaves_of(layout: Layout) -> int:
    if layout.kind in ("tensor", "objects"):
        return 1
    return sum(_leaves_of(part) for part in layout.parts)


def _format_of(leaf: Any) -> tuple[Any, int]:
    return ("objects", 0) if isinstance(leaf, list) else (str(leaf.dtype), leaf.dim())


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, list):
        return _objects_on_host(leaf)
    leaf = leaf.cpu().contiguous()
    # A slice would keep the whole memory of its tensor alive.
    return leaf.clone() if leaf.untyped_storage().nbytes() > 2 * leaf.nbytes else leaf


def _objects_on_host(value: Any) -> Any:
    """Replace tensors inside nested objects by arrays on the host."""
    if isinstance(value, torch.Tensor):
        return to_array(value)
    if isinstance(value, dict):
        return {k: _objects_on_host(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_objects_on_host(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _kind_of(leaf: Any) -> Any:
    """Return dtype and shape of an array's rows; None for a list."""
    return None if isinstance(leaf, list) else (leaf.dtype.str, leaf.shape[1:])


def _without_rows(kind: Any) -> Any:
    return [] if kind is None else np.empty((0, *kind[1]), kind[0])


def _different(
    one: str, other: str, layouts: Sequence[Layout], others: Sequence[Layout]
) -> DataError:
    labels = _PARTS.index("labels")
    if (layouts[labels].kind == "none") != (others[labels].kind == "none"):
        return DataError(
            Problem(
                f"one of {one} and {other} has labels, and the other has none",
                "metrics need the labels of all samples, or of none",
                "give every sample labels, evaluate those without them on their own, or name the "
                "labels in label_names",
            )
        )
    return DataError(
        Problem(
            f"the predictions of {one} are not nested or formatted like those of {other}",
            "tensors can only be joined with tensors of the same type and number of dimensions",
            "return the same outputs for every batch, name those that vary in ignore_keys, or set "
            "eval_use_gather_object",
        )
    )
