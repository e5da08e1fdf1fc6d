"""Training, and going on from a checkpoint, for comparisons with a run that never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from tests.distributed.runs import history, losses, make_trainer, whole_weights
from tests.models import RaggedTokens, pad_collate, tiny_llama

# 22 samples in micro-batches of 2 on 2 ranks: 6 micro-steps an epoch, the last one short.
EPOCH = {"train": 22, "num_train_epochs": 2}


def noisy_llama() -> Any:
    """Return a llama that draws random numbers in every forward pass of training."""
    return tiny_llama(attention_dropout=0.3)


def run(folder: Path, *, resume: Any = False, **settings: Any) -> dict[str, Any]:
    """Train; the weights, the history and the files of the last checkpoint."""
    from dstrain.checkpoint import committed, read_manifest

    trainer = make_trainer(folder, model=settings.pop("model", noisy_llama)(), **settings)
    trainer.train(resume)
    last = committed(folder)[-1].folder
    outcome = {
        "weights": whole_weights(trainer),
        "history": history(trainer),
        "losses": losses(trainer),
        "state": {
            name: record
            for name, record in read_manifest(last).files.items()
            if name.endswith(".safetensors")
        },
        "run": run_file(last),
        "steps": trainer.state.global_step,
    }
    trainer.close()
    return outcome


def run_file(folder: Path) -> Any:
    """Read ``run.json`` without times."""
    content = json.loads((folder / "state/run.json").read_text())
    for meter in content["position"]["meters"]:
        del meter["seconds"]
    return content


def assert_same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    """Check, bit for bit, weights, history, master weights, optimizer state and counters."""
    for name, weights in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weights), name
    assert resumed["history"] == whole["history"]
    assert resumed["state"] == whole["state"]
    assert resumed["run"] == whole["run"]


def check(folder: Path, rank: int, at: int, **settings: Any) -> None:
    """Train through with a checkpoint at step ``at``, then from there in a folder of its own."""
    from dstrain.core.ranks import barrier

    settings = {"save_strategy": "steps", "save_steps": at, **EPOCH, **settings}
    whole = run(folder / "whole", **settings)
    start = folder / "again" / f"checkpoint-{at}"
    if rank == 0:
        shutil.copytree(folder / "whole" / start.name, start)
    barrier()
    resumed = run(folder / "again", resume=True, **settings)
    assert whole["steps"] > at
    assert_same(resumed, whole)


class Stream(IterableDataset[Any]):
    """The samples of ``RaggedTokens`` without a length, in another order each epoch."""

    def __init__(self, num_samples: int) -> None:
        self.samples = RaggedTokens(num_samples)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.samples)):
            yield self.samples[(index * 5 + self.epoch) % len(self.samples)]


def masking_collate(examples: Any) -> dict[str, torch.Tensor]:
    """Drop tokens at random, as a masked-language-model collator does."""
    batch = pad_collate(examples)
    dropped = torch.rand(batch["input_ids"].shape) < 0.2
    return batch | {"input_ids": batch["input_ids"].masked_fill(dropped, 3)}


def from_rank_zero(value: str) -> str:
    from dstrain.core.ranks import gather_objects

    return gather_objects(value)[0]
