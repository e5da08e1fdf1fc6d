"""A rank's share of a micro-step of a stream, as a loader process sends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.utils.data._utils import pin_memory as pinning

from dstrain.data.comparison.differences import SampleSummary


@dataclass
class Share:
    """A rank's part of a micro-step, collated.

    Attributes:
        inputs: the micro-batch.
        num_samples: samples that were collated; 0 where this rank had none left and ``inputs`` is a
            padding batch, which must carry no weight.
        summaries: what the samples of all ranks said, while these are compared.
    """

    inputs: Any
    num_samples: int
    summaries: list[SampleSummary] = field(default_factory=list)

    def pin_memory(self) -> Share:
        """Return a copy in page-locked memory; torch's loader asks for it."""
        return Share(pinning.pin_memory(self.inputs), self.num_samples, self.summaries)


@dataclass
class ShareWithState:
    """A micro-batch on its way from a loader process, with the source's position.

    Attributes:
        share: what the training process is to get.
        position: samples of the epoch up to its end, over all ranks.
        state: the source's state there, pickled; None where that cannot be.
    """

    share: Share
    position: int
    state: bytes | None

    def pin_memory(self) -> ShareWithState:
        """Return a copy in page-locked memory; torch's loader asks for it."""
        return ShareWithState(self.share.pin_memory(), self.position, self.state)
