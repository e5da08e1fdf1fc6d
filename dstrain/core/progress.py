"""Progress of a run in steps, epochs and samples, as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dstrain.core.documents import Count


@dataclass(frozen=True)
class Progress:
    """Position of a run in steps and in samples.

    Attributes:
        step: optimizer steps finished, skipped steps included.
        epoch: index of the epoch in progress, from 0.
        steps_in_epoch: optimizer steps finished in this epoch.
        samples_in_epoch: samples of this epoch used in finished steps, over all ranks.
        num_input_tokens: input tokens (padding included) that this rank has trained on.
    """

    step: Count = 0
    epoch: Count = 0
    steps_in_epoch: Count = 0
    samples_in_epoch: Count = 0
    num_input_tokens: Count = 0

    def advance(self, *, samples: int, tokens: int) -> Progress:
        """Return the position after one more optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            steps_in_epoch=self.steps_in_epoch + 1,
            samples_in_epoch=self.samples_in_epoch + samples,
            num_input_tokens=self.num_input_tokens + tokens,
        )

    def next_epoch(self) -> Progress:
        """Return the position at the start of the following epoch."""
        return replace(self, epoch=self.epoch + 1, steps_in_epoch=0, samples_in_epoch=0)
