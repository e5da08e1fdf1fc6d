"""Figures of training, kept on the device between logs so that no step waits for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dstrain.core.ranks import sum_over_ranks

_MOST_WINDOWS = 1024
"""Steps whose losses are kept unread; a run that never logs waits for the device that seldom."""


@dataclass(frozen=True)
class Reading:
    """Holds the figures of the steps since the meter was last read, over all ranks.

    Attributes:
        loss: mean over steps of the global batch's mean loss; where bad losses are filtered, over
            the steps that had a finite one (NaN when no step had).
        loss_sum: that mean times the number of steps.
        num_steps: steps since the last reading.
        num_tokens: input tokens.
        seconds: wall-clock time.
        first_bad_step: the first step of the run with a NaN or infinite loss, or None.
        empty_columns: columns of its batches that held no target in some micro-batch.
    """

    loss: float
    loss_sum: float
    num_steps: int
    num_tokens: int
    seconds: float
    first_bad_step: int | None
    empty_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Window:
    """Holds the losses of a step, not yet read from the device.

    Attributes:
        step: the step's number in the run.
        losses: losses of this rank's micro-batches, with one element for each part of the loss.
        counts: targets of each part.
        totals: targets of the window over all ranks; a tensor where they are on the device.
        empty: columns of this rank's batches without a target in some micro-batch.
    """

    step: int
    losses: list[torch.Tensor]
    counts: list[tuple[int, ...]]
    totals: torch.Tensor | float
    empty: frozenset[str] = frozenset()

    def share(self, numbers: Iterator[float]) -> float:
        """Add up this rank's share of the global batch's loss.

        Args:
            numbers: the elements of all losses, then of the totals.
        """
        losses = [[next(numbers) for _ in counts] for counts in self.counts]
        share = 0.0
        for part, counts in enumerate(zip(*self.counts, strict=True)):
            # A micro-batch without a target has no loss: its mean is no number. Nor has a window.
            summed = sum(x[part] * n for x, n in zip(losses, counts, strict=True) if n)
            share += summed / max(1.0, next(numbers))
        return share


class TrainMeter:
    """Keeps the losses of steps; reading them is the only thing that waits for the device.

    Adding one starts no work on the device. Sums are those of Python's numbers, one step after the
    other, so they do not depend on when they are read.
    """

    def __init__(self, device: torch.device | str, *, filter_bad: bool) -> None:
        """Begin at zero.

        Args:
            device: where ranks sum up.
            filter_bad: whether losses that are not finite are left out of the mean.
        """
        self._device = device
        self._filter = filter_bad
        self._windows: list[_Window] = []
        self._loss = 0.0
        self._finite = 0
        self._bad = -1
        self._empty: frozenset[str] = frozenset()  # of the first bad step
        self._steps = 0
        self._tokens = 0
        self._since = time.perf_counter()

    def start(self) -> None:
        """Count time from here on."""
        self._since = time.perf_counter()

    def add(
        self,
        losses: list[torch.Tensor],
        counts: list[tuple[int, ...]],
        totals: torch.Tensor | float,
        *,
        step: int,
        num_tokens: int,
        empty: frozenset[str] = frozenset(),
    ) -> None:
        """Add a step: the mean losses of this rank's micro-batches, and what they weigh.

        Args:
            losses: of one element, or of one for each part of the loss; not read here.
            counts: targets of each part of each loss.
            totals: targets of the whole window over all ranks, of each part; the weights are
                counts / totals.
            step: of the run.
            num_tokens: input tokens of this rank.
            empty: columns that held no target in some micro-batch of this rank.
        """
        self._windows.append(_Window(step, losses, counts, totals, empty))
        self._steps += 1
        self._tokens += num_tokens
        if len(self._windows) >= _MOST_WINDOWS:
            self._fold()

    def _fold(self) -> None:
        """Read what has been added and add it up; waits for the device."""
        windows, self._windows = self._windows, []
        numbers = _read([part for window in windows for part in (*window.losses, window.totals)])
        for window in windows:
            share = window.share(numbers)
            finite = math.isfinite(share)
            if not finite and self._bad < 0:
                self._bad, self._empty = window.step, window.empty
            self._finite += finite
            self._loss += share if finite or not self._filter else 0.0

    def read(self) -> Reading:
        """Sum over ranks, wait for the device, start anew; a collective of all ranks."""
        self._fold()
        # A rank whose losses were all bad has nothing to average: 0/0 says so.
        steps = self._finite if self._filter and self._steps else max(1, self._steps)
        mean = self._loss / steps if steps else math.nan
        mine = torch.tensor([mean, self._bad >= 0, self._tokens], dtype=torch.float64)
        loss, num_bad, tokens = sum_over_ranks(mine.to(self._device)).tolist()
        first_bad, empty = self._first_bad_step() if num_bad else (None, ())
        now = time.perf_counter()
        reading = Reading(
            loss=loss,
            loss_sum=loss * self._steps,
            num_steps=self._steps,
            num_tokens=int(tokens),
            seconds=now - self._since,
            first_bad_step=first_bad,
            empty_columns=empty,
        )
        self._loss, self._finite, self._bad = 0.0, 0, -1
        self._empty = frozenset()
        self._steps = self._tokens = 0
        self._since = now
        return reading

    def state(self) -> dict[str, float]:
        """Return this rank's sums since the last reading; wait for the device."""
        self._fold()
        return {
            "loss": self._loss,
            "finite": self._finite,
            "bad": self._bad,
            "steps": self._steps,
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._since,
        }

    def restore(self, states: list[dict[str, float]], *, rank: int, world_size: int) -> None:
        """Go on from the states of all ranks of an earlier run, in rank order.

        Where the number of ranks has changed the main rank takes over all that was added: only the
        sum over ranks is ever read.
        """
        mine = states[rank] if len(states) == world_size else _merged(states, self._filter, rank)
        self._windows = []
        self._loss = mine["loss"]
        self._finite, self._bad = int(mine["finite"]), int(mine["bad"])
        self._steps, self._tokens = int(mine["steps"]), int(mine["tokens"])
        self._since = time.perf_counter() - mine["seconds"]

    def exclude(self, seconds: float) -> None:
        """Leave time that was not training (an evaluation, a save) out of the speed."""
        self._since += seconds

    def _first_bad_step(self) -> tuple[int, tuple[str, ...]]:
        """Return it, and the columns that held no target there, of all ranks."""
        from dstrain.core.ranks import gather_objects

        told = gather_objects((self._bad, self._empty))
        found = [(step, names) for step, names in told if step >= 0]
        first = min(step for step, _ in found)
        return first, tuple(sorted({n for step, names in found if step == first for n in names}))


def _read(parts: list[torch.Tensor | float]) -> Iterator[float]:
    """Yield the elements of tensors, and numbers, in order; wait once for each dtype and device."""
    read: list[list[float]] = [[] for _ in parts]
    alike: dict[Any, list[tuple[int, torch.Tensor]]] = {}
    for place, part in enumerate(parts):
        if isinstance(part, torch.Tensor):
            alike.setdefault((part.dtype, part.device), []).append((place, part.reshape(-1)))
        else:
            read[place] = [part]
    for same in alike.values():
        numbers = iter(torch.cat([part for _, part in same]).tolist())
        for place, part in same:
            read[place] = [next(numbers) for _ in range(part.numel())]
    return chain.from_iterable(read)


def _merged(states: list[dict[str, float]], filtered: bool, rank: int) -> dict[str, float]:
    """Merge all ranks' sums when a run goes on at other ranks: the main rank gets all of them."""
    steps = states[0]["steps"]
    merged = {**states[0], "loss": 0.0, "finite": float(steps), "bad": -1.0, "tokens": 0}
    if rank == 0 and steps:
        # Each rank divided by its own number of finite losses; from here on all divide by `steps`.
        counts = [s["finite"] if filtered else steps for s in states]
        means = [s["loss"] / n if n else math.nan for s, n in zip(states, counts, strict=True)]
        merged["loss"] = sum(means) * steps
        merged["bad"] = min((s["bad"] for s in states if s["bad"] >= 0), default=-1.0)
        merged["tokens"] = sum(s["tokens"] for s in states)
    return merged
