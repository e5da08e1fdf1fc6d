"""Streams that begin alike on all ranks and are split by rank later on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from tests.distributed.split_data import rows

SIZE = 40  # at most 64, so that a whole epoch is compared
BEGIN = 9  # equal samples: more than are looked at before the first step


def numbers_of(rank: int, world_size: int, begin: int = BEGIN, size: int = SIZE) -> list[int]:
    """Return the numbers of a rank's samples: the first ones on all ranks, then its own."""
    return [*range(begin), *range(begin + rank, size, world_size)]


def generate(numbers: list[int]) -> Iterator[dict[str, Any]]:
    yield from rows(numbers)


class Later(IterableDataset[Any]):
    """Split by rank after the first samples."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        return generate(self.numbers)


class Once(Later):
    """The same, with a single iteration."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(numbers)
        self.iteration = generate(numbers)

    def __iter__(self) -> Iterator[Any]:
        return self.iteration


def of_hub(numbers: list[int]) -> Any:
    from datasets import IterableDataset as HubDataset

    return HubDataset.from_generator(generate, gen_kwargs={"numbers": numbers})


def alike_on_all(text: str) -> bool:
    from dstrain.core.ranks import gather_objects

    return len(set(gather_objects(text))) == 1


def check_refused(use: Callable[[], Any], what: str) -> str:
    """Check that all ranks raise one error, with what was seen and what to do."""
    from dstrain.core.errors import DataError

    with pytest.raises(DataError, match=f"{what} began alike on all ranks, and then is") as caught:
        use()
    text = str(caught.value)
    assert alike_on_all(text)
    assert "give every rank the whole stream" in text
    assert "split_dataset_by_node" in text
    return text
