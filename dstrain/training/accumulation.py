"""Running the forward and backward passes of one optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dstrain.core.ranks import HostSum, Ranks
from dstrain.data import LossTargets, MicroBatch, TokenCount, empty_columns
from dstrain.engine import Engine, device_name
from dstrain.training.key_value_cache import KeyValueCache
from dstrain.training.place import Place
from dstrain.training.window_weights import WindowWeights, most_telling_first


@dataclass(frozen=True)
class MicroStep:
    """Describes a micro-batch and its place in the optimizer step.

    Attributes:
        inputs: the batch as the loader gave it; targets are counted in it.
        num_samples: samples in the micro-batch, where that is known.
        index: place of the micro-batch in its window, from 0.
        is_last: whether it is the last of its window, after which gradients are complete.
        weights: weights of the window's micro-batches in the loss of the global batch; None
            outside of a step.
        looks_again: whether its forward pass is watched, though it is known what the loss is a mean
            over.
    """

    inputs: object
    num_samples: int | None = None
    index: int = 0
    is_last: bool = True
    weights: WindowWeights | None = None
    looks_again: bool = False

    def weighted(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a mean loss, of shape () or (parts,), by its weight in the global batch's loss.

        Known once the first forward pass of a step has shown what a target is; a collective then.
        """
        if self.weights is None:
            return loss
        if not any(self.weights.counts[self.index]):
            loss = loss.nan_to_num()  # the mean over no target: its weight is 0
        return loss * self.weights.of(self.index)


@dataclass(frozen=True)
class Accumulated:
    """Holds the results of a step's passes.

    Attributes:
        losses: losses of this rank's micro-batches, each of shape () or (parts,), on the device.
        weights: weights of these micro-batches in the loss of the global batch.
        num_tokens: input tokens of this rank.
        empty_columns: label columns of this rank that held no target in some micro-batch.
    """

    losses: list[torch.Tensor]
    weights: WindowWeights
    num_tokens: int
    empty_columns: frozenset[str]


class PassHooks(Protocol):
    """Declares the methods that are called for each micro-batch; see ``Hooks``."""

    def train_micro_batch(
        self, micro_step: MicroStep, num_targets: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch; return its mean loss, or its parts."""
        ...

    def count_flos(self, inputs: object) -> None:
        """Count the floating-point operations of a micro-batch."""
        ...

    def event(self, name: str) -> object:
        """Tell callbacks of an event."""
        ...


@dataclass
class Accumulation:
    """Runs the micro-batches of a step.

    Attributes:
        engine: the engine that takes the gradients.
        targets: what the loss is a mean over.
        ranks: rank and world size of this process.
        hooks: methods that are called for each micro-batch.
        cache: the model's key-value cache, which is off in training unless asked for.
        count_tokens: counts input tokens.
        place: the place that the run has come to, for messages.
        vote: called when all micro-batches of a step are done on this rank, before the step changes
            a weight; a collective, which fails where one rank failed.
        computing: whether a step's micro-batches are being computed, and nothing is changed yet.
    """

    engine: Engine
    targets: LossTargets
    ranks: Ranks
    hooks: PassHooks
    cache: KeyValueCache
    count_tokens: TokenCount
    place: Place
    vote: Callable[[], None] | None = None
    computing: bool = False
    _host_sum: HostSum = field(default_factory=HostSum)

    def run(self, micro_batches: Sequence[MicroBatch], *, looks_again: bool) -> Accumulated:
        """Run forward and backward over the micro-batches of a window; ``finish`` comes after it.

        Args:
            micro_batches: this rank's micro-batches; equally many on all ranks.
            looks_again: whether the first forward pass is watched on all ranks.
        """
        micro_batches = most_telling_first(micro_batches, self.targets)
        weights = WindowWeights(
            self.targets,
            micro_batches,
            self.ranks,
            device=device_name(),
            host_sum=self._host_sum,
            looks_again=looks_again,
        )
        losses: list[torch.Tensor] = []
        num_tokens = 0
        empty: frozenset[str] = frozenset()
        self.computing = True
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self.place.enter(f"micro-batch {index + 1}", in_step=True)
            loss = self._pass(micro_batch, index, weights, is_last=is_last, looks_again=looks_again)
            losses.append(loss.detach().clone())  # a CUDA graph writes the next into its place
            if not micro_batch.is_padding:
                num_tokens += self.count_tokens(micro_batch.inputs)
                empty |= empty_columns(micro_batch.inputs)
            if not is_last:
                self.hooks.event("on_substep_end")
        return Accumulated(losses, weights, num_tokens, empty)

    def finish(self) -> None:
        """Agree that the passes of all ranks are done; weights may change from here on."""
        if self.vote is not None:
            self.vote()
        self.computing = False

    def go_on_with(self, engine: Engine) -> None:
        """Let another engine take the gradients, in process groups that were formed anew."""
        self.engine = engine
        self._host_sum = HostSum()  # the groups of before are gone

    def close(self) -> None:
        """End the thread that adds up on the hosts."""
        self._host_sum.close()

    def _pass(
        self,
        micro_batch: MicroBatch,
        index: int,
        weights: WindowWeights,
        *,
        is_last: bool,
        looks_again: bool,
    ) -> torch.Tensor:
        """Run one micro-batch; return its mean loss, or its parts where the loss has several."""
        inputs = micro_batch.inputs
        counts = weights.expected(index)
        if not any(counts):
            inputs = self.targets.without_ignored(inputs)
        micro_step = MicroStep(
            inputs, micro_batch.num_samples, index, is_last, weights, looks_again
        )
        told = self.targets.target_count(inputs, micro_batch.num_samples, counts=counts)
        changes = self.engine.changes
        watch = contextlib.nullcontext() if changes is None else changes.in_training_step()
        with self.cache.as_asked(), watch:
            loss = self.hooks.train_micro_batch(micro_step, told)
        if not micro_batch.is_padding:
            self.hooks.count_flos(inputs)
        return loss
