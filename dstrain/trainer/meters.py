"""Figures of training, kept on the device between logs so that no step waits for them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.core.ranks import sum_over_ranks


@dataclass(frozen=True)
class Reading:
    """What the meter has seen since it was last read, over all ranks.

    Attributes:
        loss: mean over steps of the global batch's mean loss; where bad losses are filtered, over
            the steps that had a finite one (NaN when no step had).
        loss_sum: that mean times the number of steps.
        num_steps: steps since the last reading.
        num_tokens: input tokens.
        seconds: wall-clock time.
        first_bad_step: the first step of the run with a NaN or infinite loss, or None.
    """

    loss: float
    loss_sum: float
    num_steps: int
    num_tokens: int
    seconds: float
    first_bad_step: int | None


class TrainMeter:
    """Adds up losses on the device; reading it is the only thing that waits for the device."""

    def __init__(self, device: Any, *, filter_bad: bool) -> None:
        """Args: where losses are, and whether NaN and infinite ones are left out of the mean."""
        self._device = device
        self._filter = filter_bad
        self._loss = torch.zeros((), dtype=torch.float32, device=device)
        self._finite = torch.zeros((), dtype=torch.float32, device=device)
        self._bad = torch.full((), -1.0, dtype=torch.float32, device=device)
        self._steps = 0
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor, *, step: int, num_tokens: int) -> None:
        """Add this rank's share of a step's loss (its sum over ranks is the global mean)."""
        finite = torch.isfinite(loss)
        self._bad = torch.where(finite | (self._bad >= 0), self._bad, float(step))
        if self._filter:
            self._finite = self._finite + finite
            loss = torch.where(finite, loss, 0.0)
        self._loss = self._loss + loss
        self._steps += 1
        self._tokens += num_tokens

    def read(self) -> Reading:
        """Sum over ranks, wait for the device, start anew; a collective of all ranks."""
        bad = torch.where(self._bad >= 0, 1.0, 0.0)
        # A rank whose losses were all bad has nothing to average: 0/0 says so.
        steps = self._finite if self._filter and self._steps else max(1, self._steps)
        sums = torch.stack([self._loss.double() / steps, bad.double()])
        counted = torch.tensor([float(self._tokens)], dtype=torch.float64)
        loss, num_bad, tokens = sum_over_ranks(torch.cat([sums, counted.to(self._device)])).tolist()
        first_bad = self._first_bad_step() if num_bad else None
        now = time.perf_counter()
        reading = Reading(
            loss=loss,
            loss_sum=loss * self._steps,
            num_steps=self._steps,
            num_tokens=int(tokens),
            seconds=now - self._since,
            first_bad_step=first_bad,
        )
        self._loss = torch.zeros_like(self._loss)
        self._finite = torch.zeros_like(self._finite)
        self._bad = torch.full_like(self._bad, -1.0)
        self._steps = self._tokens = 0
        self._since = now
        return reading

    def state(self) -> dict[str, float]:
        """What has been added since the last reading, of this rank; waits for the device."""
        sums = torch.stack([self._loss, self._finite, self._bad]).tolist()
        return {
            "loss": sums[0],
            "finite": sums[1],
            "bad": sums[2],
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
        self._loss = torch.full_like(self._loss, mine["loss"])
        self._finite = torch.full_like(self._finite, mine["finite"])
        self._bad = torch.full_like(self._bad, mine["bad"])
        self._steps, self._tokens = int(mine["steps"]), int(mine["tokens"])
        self._since = time.perf_counter() - mine["seconds"]

    def exclude(self, seconds: float) -> None:
        """Leave time that was not training (an evaluation, a save) out of the speed."""
        self._since += seconds

    def _first_bad_step(self) -> int:
        from dstrain.core.ranks import gather_objects

        return min(int(s) for s in gather_objects(float(self._bad)) if s >= 0)


def _merged(states: list[dict[str, float]], filtered: bool, rank: int) -> dict[str, float]:
    """One rank's part when other ranks than these go on: all of it for the main rank."""
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
