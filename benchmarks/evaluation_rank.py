"""One rank of a run of `evaluation.py`: an evaluation, and what the process took for it."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from evaluation import Settings

SEED = 42
POLL_SECONDS = 0.002


class Meter:
    """The peak of this process's memory over what it was at the start, by looking all the time.

    Anonymous pages are what an allocation takes and only its release gives back. Mapped ones are of
    files, here those of predictions, and the system drops them when it needs the memory. Resident
    are both together, and what ranks share. Each has its peak at a time of its own.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide what is taken now
        self._before = self._now()
        self._peak = dict(self._before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, float]:
        """Stop; return by how many MB each figure rose at its peak."""
        self._stop.set()
        self._thread.join()
        return {name: (self._peak[name] - self._before[name]) / 1e6 for name in self._peak}

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            for name, value in self._now().items():
                self._peak[name] = max(self._peak[name], value)

    @staticmethod
    def _now() -> dict[str, int]:
        names = {"RssAnon": "anonymous_mb", "RssFile": "mapped_mb", "VmRSS": "resident_mb"}
        found = {}
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                found[names[name]] = int(value.split()[0]) * 1024
        return found


def accuracy(predictions: Any, labels: Any) -> tuple[int, int]:
    """Count the tokens that were predicted rightly, and all tokens."""
    right = predictions.argmax(-1)[:, :-1] == labels[:, 1:]
    return int(right.sum()), int(np.prod(right.shape))


def compute_metrics(prediction: Any) -> dict[str, float]:
    """Compute the accuracy as users do, over everything at once."""
    right, number = accuracy(prediction.predictions, prediction.label_ids)
    return {"accuracy": right / number}


def nothing(prediction: Any) -> dict[str, float]:
    """Read no prediction, so that only the collecting is measured."""
    return {"rows": float(len(prediction.predictions))}


class BatchAccuracy:
    """The same, batch by batch."""

    right = number = 0

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        """Add a batch."""
        right, number = accuracy(prediction.predictions, prediction.label_ids)
        self.right, self.number = self.right + right, self.number + number
        return {"accuracy": self.right / self.number} if compute_result else {}


def main() -> None:
    """Evaluate once to warm up and once measured; rank 0 writes the result."""
    settings = Settings(**json.loads(sys.argv[1]))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if settings.contender == "transformers" and not importlib.util.find_spec("accelerate"):
        if int(os.environ["RANK"]) == 0:
            missing = {"missing": "accelerate is not installed"}
            Path(settings.result).write_text(json.dumps(missing))
        return
    with tempfile.TemporaryDirectory() as folder:
        build = transformers_trainer if settings.contender == "transformers" else dstrain_trainer
        trainer = build(settings, folder)
        warm_up = _samples(settings, 2 * settings.batch * settings.world_size)
        trainer.evaluate(warm_up)
        if isinstance(trainer.compute_metrics, BatchAccuracy):
            trainer.compute_metrics = BatchAccuracy()
        dataset = _samples(settings, settings.samples)
        dist.barrier()
        meter, started = Meter(), time.perf_counter()
        metrics = trainer.evaluate(dataset)
        seconds, peak = time.perf_counter() - started, meter.finish()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, peak)
    if dist.get_rank() == 0:
        import deepspeed
        import transformers

        result = {name: [p[name] for p in gathered] for name in peak}
        result |= {"seconds": seconds, "metric": metrics.get("eval_accuracy")}
        result |= {"loss": metrics["eval_loss"]}
        result["versions"] = {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)}
        Path(settings.result).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def dstrain_trainer(settings: Settings, folder: str) -> Any:
    """Return dstrain's Trainer, before training."""
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=settings.batch,
        zero_stage=str(settings.stage),
        batch_eval_metrics=settings.contender == "dstrain-batches",
        report_to=["none"],
        disable_tqdm=True,
    )
    metrics: Any = {
        "loss": None,
        "dstrain-collect": nothing,
        "dstrain": compute_metrics,
        "dstrain-batches": BatchAccuracy(),
    }
    return Trainer(_model(settings), args, compute_metrics=metrics[settings.contender])


def transformers_trainer(settings: Settings, folder: str) -> Any:
    """Return transformers' Trainer, with accelerate and the same ZeRO stage."""
    from transformers import Trainer, TrainingArguments

    model = _model(settings)  # before the arguments, which may turn on zero.Init
    args = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=settings.batch,
        use_cpu=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": settings.batch,
            "zero_optimization": {"stage": settings.stage},
        },
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model, args, compute_metrics=compute_metrics)


def _model(settings: Settings) -> Any:
    """Return a small model with large outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=settings.classes,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _samples(settings: Settings, number: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, settings.classes, (number, settings.length), generator=draw)
    return [{"input_ids": row, "labels": row} for row in tokens]


if __name__ == "__main__":
    main()
