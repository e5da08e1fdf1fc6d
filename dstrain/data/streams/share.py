"""Micro-batches of a stream, in the form in which loader processes send them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.utils.data._utils import pin_memory as pinning

from dstrain.data.comparison.differences import SampleSummary


@dataclass
class Share:
    """Collated share of a rank in a micro-step.

    Attributes:
        inputs: the micro-batch.
        num_samples: number of collated samples; 0 if this rank had none and ``inputs`` is a padding
            batch, which must have no weight in the loss.
        summaries: summaries of the samples of all ranks, while samples are compared; else empty.
    """

    inputs: Any
    num_samples: int
    summaries: list[SampleSummary] = field(default_factory=list)

    def pin_memory(self) -> Share:
        """Return a copy in page-locked memory; torch's loader asks for it."""
        return Share(pinning.pin_memory(self.inputs), self.num_samples, self.summaries)


@dataclass
class ShareWithState:
    """Micro-batch from a loader process, with the state of the source after it.

    Attributes:
        share: the micro-batch.
        position: samples of the epoch up to the end of the micro-batch, over all ranks.
        state: the source's pickled state at this position; None if it is not known.
    """

    share: Share
    position: int
    state: bytes | None

    def pin_memory(self) -> ShareWithState:
        """Return a copy in page-locked memory; torch's loader asks for it."""
        return ShareWithState(self.share.pin_memory(), self.position, self.state)
