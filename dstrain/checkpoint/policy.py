"""Settings of a run for saving checkpoints, and the values it adds to each checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.checkpoint.manifest import SLICES, Layout


@dataclass(frozen=True)
class Policy:
    """Settings of a run for saving checkpoints.

    Attributes:
        output_dir: folder of the checkpoints.
        limit: number of checkpoints to keep; None or 0 keeps all.
        only_model: leave out all state for a resume.
        with_weights: write the model's weights as Hugging Face files too.
        asynchronous: write in the background; None decides by the available memory.
        on_each_node: machines have no shared disk: write a folder on every machine, with the files
            of the machine's ranks and all files that belong to no rank.
        stop_on_failure: whether a failed save ends the run.
        layout: layout of the state for a resume; DeepSpeed's own is written while training waits.
    """

    output_dir: Path
    limit: int | None = None
    only_model: bool = False
    with_weights: bool = True
    asynchronous: bool | None = None
    on_each_node: bool = False
    stop_on_failure: bool = True
    layout: Layout = SLICES


@dataclass(frozen=True)
class RunRecord:
    """Values that the trainer adds to a checkpoint: plain values and tensors.

    Attributes:
        step: optimizer steps done.
        shared: values that are the same on all ranks.
        rank_state: values of this rank alone, such as its random state.
        documents: further files, written by the main rank: name -> JSON content.
        write_processor: writes tokenizer or processor into a folder, or None.
        metrics: metrics of the last evaluation.
        best: folder of the best checkpoint so far, which rotation keeps.
        after_commit: called on the main rank with the committed folder, before older checkpoints
            are removed; in the writing thread if the save is in the background. Its exceptions are
            only logged, as the checkpoint exists by then.
    """

    step: int
    shared: dict[str, Any]
    rank_state: dict[str, Any]
    documents: dict[str, Any] = field(default_factory=dict)
    write_processor: Callable[[Path], None] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: Path | None = None
    after_commit: Callable[[Path], None] | None = None
