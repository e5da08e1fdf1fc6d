"""Saving and loading of a stream's position, so that a resume reads no used sample again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem

# Steps of a ``datasets.IterableDataset`` whose state is exact; the step with the buffer of a
# shuffle is replaced by our own. Steps that format whole tables are not among them.
_EXACT = frozenset(
    {
        "ArrowExamplesIterable",
        "BufferShuffledExamplesIterable",
        "CyclingMultiSourcesExamplesIterable",
        "ExamplesIterable",
        "FilteredExamplesIterable",
        "FormattedExamplesIterable",
        "HorizontallyConcatenatedMultiSourcesExamplesIterable",
        "InterleavedShardsExamplesIterable",
        "MappedExamplesIterable",
        "RandomlyCyclingMultiSourcesExamplesIterable",
        "RebatchedArrowExamplesIterable",
        "RepeatExamplesIterable",
        "SelectColumnsIterable",
        "SkipExamplesIterable",
        "TakeExamplesIterable",
        "VerticallyConcatenatedMultiSourcesExamplesIterable",
    }
)


class Resumable:
    """Wrapper of a stream whose ``state_dict`` and ``load_state_dict`` are exact.

    Attributes:
        source: the stream to iterate, which may be a copy of the one that was given.
    """

    def __init__(self, source: Iterable[Any], kind: str, *, keeps_start: bool) -> None:
        """Wrap a stream.

        Args:
            source: the stream to iterate.
            kind: description of the stream; states of another kind are refused.
            keeps_start: whether a loaded state stays in force for later iterations.
        """
        self.source: Any = source
        self._kind = kind
        self._keeps_start = keeps_start

    @staticmethod
    def of(source: Any) -> Resumable | None:
        """Wrap a stream if its states are exact; else return None."""
        import datasets

        if isinstance(source, datasets.IterableDataset):
            steps = _steps(source) if type(source) is datasets.IterableDataset else None
            return Resumable(_with_own_steps(source), steps, keeps_start=True) if steps else None
        if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
            return Resumable(source, type(source).__qualname__, keeps_start=False)
        return None

    def state(self) -> dict[str, Any] | None:
        """Return a copy of the stream's state after its latest sample; None if it is not known."""
        state = self.source.state_dict()
        return None if state is None else {"kind": self._kind, "state": copy.deepcopy(state)}

    def load(self, state: dict[str, Any]) -> bool:
        """Set the next iteration to begin at ``state``; return False if the state is refused.

        States of another kind are refused; a user's ``load_state_dict`` may refuse by returning
        False.

        Raises:
            CheckpointError: the stream's ``load_state_dict`` fails.
        """
        if state.get("kind") != self._kind:
            return False
        try:
            return self.source.load_state_dict(copy.deepcopy(state.get("state"))) is not False
        except Exception as error:  # a user's stream may raise anything
            raise CheckpointError(
                Problem(
                    f"the training data, a {type(self.source).__name__}, cannot take up its state "
                    "in the checkpoint",
                    f"{type(error).__name__}: {error}",
                    "resume with the data of the run that wrote it, or set ignore_data_skip, "
                    "which begins the epoch anew",
                )
            ) from error

    def begun(self) -> None:
        """Discard a loaded state, so that later iterations begin at the beginning.

        Call it after the first sample.
        """
        if self._keeps_start:
            self.source.load_state_dict(None)


def set_source_epoch(source: Any, epoch: int) -> None:
    """Set a source's epoch, by its ``set_epoch`` or else its ``torch.Generator``."""
    generator = getattr(source, "generator", None)
    if hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(epoch)


def _steps(dataset: Any) -> str | None:
    """Describe the steps of a ``datasets.IterableDataset``; None if its state is not exact."""
    formatting = getattr(dataset, "_formatting", None)
    if formatting is not None and formatting.is_table:
        return None
    steps = _steps_of(getattr(dataset, "_ex_iterable", None))
    part = getattr(dataset, "_distributed", None)
    if part is None or steps is None:
        return steps
    # Positions in a rank's part are not valid in another part.
    return f"{steps}, part {part.rank} of {part.world_size} by {part.strategy}"


def _steps_of(step: Any) -> str | None:
    name = type(step).__name__
    if name not in _EXACT or _reads_ahead(step):
        return None
    before = [_steps_of(part) for part in _inputs_of(step)]
    if any(part is None for part in before):
        return None
    # States depend on these numbers.
    size = getattr(step, "buffer_size", "") if before else step.num_shards
    return f"{name}{f'[{size}]' if size else ''}({', '.join(map(str, before))})"


def _reads_ahead(step: Any) -> bool:
    """Tell whether a mapping works concurrently, or on tables."""
    formatting = getattr(step, "formatting", None)
    return (
        inspect.iscoroutinefunction(getattr(step, "function", None))
        or bool(getattr(step, "is_batch_accumulate_arrow_table_function", False))
        or getattr(step, "decoding_pool", None) is not None
        or bool(getattr(formatting, "is_table", False))
    )


def _inputs_of(step: Any) -> list[Any]:
    return [step.ex_iterable] if hasattr(step, "ex_iterable") else getattr(step, "ex_iterables", [])


def _with_own_steps(dataset: Any) -> Any:
    """Return a copy of a dataset with copies of its steps.

    Steps store the position, and datasets derived from the same dataset share them: an evaluation
    on ``data.take(100)`` would move the position of ``data.skip(100)``.
    """
    own = type(dataset)(
        ex_iterable=_copied_step(dataset._ex_iterable),
        info=dataset._info.copy(),
        split=dataset._split,
        formatting=dataset._formatting,
        distributed=dataset._distributed,
        token_per_repo_id=dataset._token_per_repo_id,
    )
    own.set_epoch(dataset.epoch)
    return own


def _copied_step(step: Any) -> Any:
    if type(step).__name__ == "BufferShuffledExamplesIterable":
        from dstrain.data.streams.shuffle_buffer import ShuffledInRounds

        return ShuffledInRounds(_copied_step(step.ex_iterable), step.buffer_size, step.generator)
    own = copy.copy(step)
    if hasattr(step, "ex_iterable"):
        own.ex_iterable = _copied_step(step.ex_iterable)
        if type(step).__name__ == "FormattedExamplesIterable":
            own.ex_iterable = _by_row(own.ex_iterable)
    elif hasattr(step, "ex_iterables"):
        own.ex_iterables = [_copied_step(part) for part in step.ex_iterables]
    return own


def _by_row(step: Any) -> Any:
    """Wrap a step so that it yields tables of a single row.

    A formatting step over tables of several rows loses the rows of a table that it has not yielded
    when a state is taken. Any shard of its input may yield tables, so every input is wrapped.
    """
    from datasets.iterable_dataset import RebatchedArrowExamplesIterable

    if isinstance(step, RebatchedArrowExamplesIterable):
        return step
    return RebatchedArrowExamplesIterable(step, batch_size=1)
