"""The way in which a run saves its checkpoints, and what it adds to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.checkpoint.manifest import SLICES, Layout


@dataclass(frozen=True)
class Policy:
    """The choices of a run about saving.

    Attributes:
        output_dir: where checkpoints go.
        limit: how many are kept; None or 0 keeps all.
        only_model: leave everything out that a resume needs.
        with_weights: write the model's weights as Hugging Face files too.
        asynchronous: write beside training; None decides by the memory that is left.
        on_each_node: write into the folder of every machine, which has a disk of its own: what is
            of a rank where the rank is, and the rest on all of them.
        stop_on_failure: whether a save that failed ends the run.
        layout: of what a resume needs; DeepSpeed's own is written while training waits.
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
    """The values that the trainer adds to the engine's state: plain values and tensors.

    Attributes:
        step: optimizer steps done.
        shared: the same on all ranks.
        rank_state: of this rank alone: random state and the like.
        documents: further files of the main rank: name -> JSON content.
        write_processor: writes tokenizer or processor into a folder, or None.
        metrics: of the last evaluation.
        best: folder of the best checkpoint so far, which stays.
        after_commit: called on the main rank with the committed folder, before older ones go; in
            the writing thread where the save is in the background. What it raises is logged: the
            checkpoint is there.
    """

    step: int
    shared: dict[str, Any]
    rank_state: dict[str, Any]
    documents: dict[str, Any] = field(default_factory=dict)
    write_processor: Callable[[Path], None] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: Path | None = None
    after_commit: Callable[[Path], None] | None = None
