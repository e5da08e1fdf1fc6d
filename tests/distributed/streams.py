"""A stream of samples that tells where it is, for the tests of resumed runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class TellsPosition:
    """Lets a stream say how many samples it has given, and go on after as many.

    Mix it in before the stream's own class, and say which samples there are.

    Attributes:
        reads: samples given by all objects of the class in this process.
        given: samples of this iteration that were given.
        begin: samples that the next iteration leaves out.
    """

    reads = given = begin = 0

    def num_samples(self) -> int:
        """Count the samples of one iteration."""
        raise NotImplementedError

    def sample(self, number: int) -> Any:
        """Return one sample; ``number`` counts from 1."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """Return where the iteration is."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where ``state`` was taken."""
        self.begin = state["given"]

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples from ``begin`` on."""
        begin, self.begin = self.begin, 0
        for self.given in range(begin + 1, self.num_samples() + 1):  # noqa: B020
            type(self).reads += 1
            yield self.sample(self.given)
