"""The shuffle buffer of a ``datasets.IterableDataset``, as a step that knows its position.

The buffer is shuffled in rounds: filled up, permuted, one half given away, the other half kept for
the next round. No state holds rows. A row is kept with probability 1/2, so the oldest in the buffer
came in about log2(buffer size) rounds ago, wherever in the stream that is; the state is what its
round began with. From there the rounds are run again, with nothing in the place of the rows that
were held then: by the round that is to be reached, all of those have left.

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
    """A step that gives rows in the order of the step of ``datasets`` whose place it takes."""

    def _init_state_dict(self) -> dict[str, Any]:
        """Return the state of the beginning; outer steps change it before an iteration."""
        self.ex_iterable._init_state_dict()
        state = {"begin": None, "rounds": 0, "given": 0, "type": type(self).__name__}
        self._state_dict: dict[str, Any] = state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Begin at a state, without the warning of the step of ``datasets``, which loses rows."""
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
        """Yield the rows that leave in a round; return those that are kept."""
        stop = len(rows) - keep
        order, given = rounds.end(len(rows), keep)
        for index in order[given:stop].tolist():
            self._state_dict["given"] += 1
            yield rows[index]
        return [rows[index] for index in order[stop:].tolist()]

    def _iter_arrow(self) -> Iterator[Any]:
        """Yield pairs of key and table: the rows that leave in a round."""
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
        """Return the rows that leave in a round, None if they are not given; and those kept.

        ``num_rows`` are those of ``tables`` after those that are missing, which no round that is
        given has: any row will do in their place.
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
        """Return the same step with another seed (of another epoch)."""
        return self._alike(super().shift_rngs(value))

    def shuffle_data_sources(self, generator: np.random.Generator) -> ShuffledInRounds:
        """Return the same step over shards in another order."""
        return self._alike(super().shuffle_data_sources(generator))

    def shard_data_sources(
        self, num_shards: int, index: int, contiguous: bool = True
    ) -> ShuffledInRounds:
        """Return the same step over some of the shards."""
        return self._alike(super().shard_data_sources(num_shards, index, contiguous=contiguous))

    def reshard_data_sources(self) -> ShuffledInRounds:
        """Return the same step over smaller shards."""
        return self._alike(super().reshard_data_sources())

    def _alike(self, step: Any) -> ShuffledInRounds:
        return type(self)(step.ex_iterable, step.buffer_size, step.generator)


class _Rounds:
    """The rounds of one iteration, counted from the one it begins with.

    Attributes:
        missing: rows held as that began, which the iteration does without.
    """

    def __init__(self, step: ShuffledInRounds) -> None:
        """Begin where the step's state says."""
        self._input = step.ex_iterable
        self._state: dict[str, Any] = step._state_dict
        self._random = copy.deepcopy(step.generator)
        begin, self._again = self._state["begin"], self._state["rounds"]
        self._begun = begin is not None
        self._given = self._state["given"]  # of the first round after those that are run again
        if begin is not None:
            self._input.load_state_dict(begin["input"])
            self._random.bit_generator.state = begin["random"]
        self.missing: int = begin["held"] if begin else 0
        self._came = np.full(self.missing, -1)  # the round with which each row held came in
        self._now = self._oldest = 0
        self._begins = deque([begin or self._begin(0)])  # of the rounds from the oldest row's on

    def end(self, num_rows: int, keep: int) -> tuple[np.ndarray, int]:
        """End a round's reading; return the new order, and how many of those that leave were given.

        Args:
            num_rows: held and read.
            keep: how many of them stay, at the end of the order.

        Raises:
            DataError: the rows are not those that were there when the state was taken.
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
        """Note that there are no rows left.

        Raises:
            DataError: there were fewer than the state says.
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
