"""Shuffle buffer for a ``datasets.IterableDataset`` whose state is exact and contains no rows.

The buffer is shuffled in rounds: it is filled up and permuted, one half is yielded, and the other
half is kept for the next round. A row is kept with probability 1/2, so the oldest row in the buffer
was read about log2(buffer size) rounds ago, at any position of the stream. The state is that of the
beginning of the oldest row's round. A resume runs the rounds again from there, with placeholders
for the rows that were in the buffer at that time: these have all left it by the saved round.

This module imports ``datasets``.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.iterable_dataset import BufferShuffledExamplesIterable

from dstrain.core.errors import DataError, Problem


class ShuffledInRounds(BufferShuffledExamplesIterable):
    """Step that replaces the shuffle step of ``datasets`` and has an exact state."""

    def _init_state_dict(self) -> dict[str, Any]:
        """Return the state of the beginning; ``datasets`` loads states into it before iterating."""
        self.ex_iterable._init_state_dict()
        state = {"begin": None, "rounds": 0, "given": 0, "type": type(self).__name__}
        self._state_dict: dict[str, Any] = state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Load a state, without the warning of the step of ``datasets``, which would lose rows."""
        return super(BufferShuffledExamplesIterable, self).load_state_dict(state_dict)

    def __iter__(self) -> Iterator[Any]:
        """Yield pairs of key and row."""
        rounds = _Rounds(self)
        rows: list[Any] = [None] * rounds.missing
        for row in self.ex_iterable:
            rows.append(row)
            if len(rows) >= self.buffer_size:
                rows = yield from self._give(rows, rounds, keep=self.buffer_size // 2)
        if rows:
            yield from self._give(rows, rounds, keep=0)
        rounds.close()

    def _give(self, rows: list[Any], rounds: _Rounds, keep: int) -> Generator[Any, None, list[Any]]:
        """Yield the rows that leave the buffer in a round; return the rows that are kept."""
        stop = len(rows) - keep
        order, given = rounds.end(len(rows), keep)
        for index in order[given:stop].tolist():
            self._state_dict["given"] += 1
            yield rows[index]
        return [rows[index] for index in order[stop:].tolist()]

    def _iter_arrow(self) -> Iterator[Any]:
        """Yield pairs of key and table, with the rows that leave the buffer in a round."""
        rounds = _Rounds(self)
        tables: list[pa.Table] = []
        key, num_rows = None, rounds.missing
        for key, table in self.ex_iterable.iter_arrow():
            tables.append(table)
            num_rows += len(table)
            if num_rows >= self.buffer_size:
                keep = self.buffer_size // 2
                left, kept = self._divide(tables, num_rows, rounds, keep=keep)
                if left is not None:
                    yield key, left
                tables, num_rows = [kept], keep
        if tables and num_rows:
            left, _ = self._divide(tables, num_rows, rounds, keep=0)
            if left is not None:
                yield key, left
        rounds.close()

    def _divide(
        self, tables: list[pa.Table], num_rows: int, rounds: _Rounds, keep: int
    ) -> tuple[pa.Table | None, pa.Table]:
        """Return the rows that leave the buffer in a round (None if not to yield), and kept rows.

        ``num_rows`` counts the rows of ``tables`` and placeholders before them. Placeholders are
        never yielded, so any row may stand for them.
        """
        table = pa.concat_tables(tables)
        missing, stop = num_rows - len(table), num_rows - keep
        order, given = rounds.end(num_rows, keep)
        shuffled = pc.take(table, np.maximum(order - missing, 0))
        if given:
            return None, shuffled.slice(stop)
        self._state_dict["given"] = stop
        return shuffled.slice(0, stop), shuffled.slice(stop)

    def shift_rngs(self, value: int) -> ShuffledInRounds:
        """Return a copy of the step with another seed, for another epoch."""
        return self._alike(super().shift_rngs(value))

    def shuffle_data_sources(self, generator: np.random.Generator) -> ShuffledInRounds:
        """Return a copy of the step over shards in another order."""
        return self._alike(super().shuffle_data_sources(generator))

    def shard_data_sources(
        self, num_shards: int, index: int, contiguous: bool = True
    ) -> ShuffledInRounds:
        """Return a copy of the step over some of the shards."""
        return self._alike(super().shard_data_sources(num_shards, index, contiguous=contiguous))

    def reshard_data_sources(self) -> ShuffledInRounds:
        """Return a copy of the step over smaller shards."""
        return self._alike(super().reshard_data_sources())

    def _alike(self, step: Any) -> ShuffledInRounds:
        return type(self)(step.ex_iterable, step.buffer_size, step.generator)


class _Rounds:
    """Rounds of an iteration, counted from its first one.

    Attributes:
        missing: number of rows in the buffer at the beginning, for which there are placeholders.
    """

    def __init__(self, step: ShuffledInRounds) -> None:
        """Restore the step's input and generator from its state."""
        self._input = step.ex_iterable
        self._state: dict[str, Any] = step._state_dict
        self._random = copy.deepcopy(step.generator)
        begin, self._again = self._state["begin"], self._state["rounds"]
        self._begun = begin is not None
        self._given = self._state["given"]  # rows yielded of the first round that is not run again
        if begin is not None:
            self._input.load_state_dict(begin["input"])
            self._random.bit_generator.state = begin["random"]
        self.missing: int = begin["held"] if begin else 0
        self._came = np.full(self.missing, -1)  # for each row in the buffer, its round of reading
        self._now = self._oldest = 0
        self._begins = deque([begin or self._begin(0)])  # states of rounds from the oldest row's on

    def end(self, num_rows: int, keep: int) -> tuple[np.ndarray, int]:
        """Permute a round's rows; return the order, and how many leaving rows were yielded before.

        Args:
            num_rows: number of rows in the buffer, those read in this round included.
            keep: number of rows that stay, at the end of the order.

        Raises:
            DataError: the data has fewer rows than when the state was taken.
        """
        order = self._random.permutation(num_rows)
        came = np.append(self._came, np.full(num_rows - len(self._came), self._now))
        given = num_rows - keep
        if self._now >= self._again:
            given = self._given if self._now == self._again else 0
            self._tell(int(came.min()), given)
        self._came = came[order[num_rows - keep :]]
        self._now += 1
        self._begins.append(self._begin(keep))
        return order, given

    def close(self) -> None:
        """Check at the end of the data that the round of the state was reached.

        Raises:
            DataError: the data has fewer rows than when the state was taken.
        """
        if self._now <= self._again and self._begun:
            raise _too_short()

    def _tell(self, oldest: int, given: int) -> None:
        if oldest < 0:
            raise _too_short()
        for _ in range(oldest - self._oldest):
            self._begins.popleft()
        self._oldest = oldest
        self._state.update(begin=self._begins[0], rounds=self._now - oldest, given=given)

    def _begin(self, held: int) -> dict[str, Any]:
        return {
            "input": self._input.state_dict(),
            "random": self._random.bit_generator.state,
            "held": held,
        }


def _too_short() -> DataError:
    return DataError(
        Problem(
            "a shuffled stream ended before the position of the checkpoint",
            "rows that were in its buffer then are no longer in the data",
            "resume with the data that the run began with",
        )
    )
