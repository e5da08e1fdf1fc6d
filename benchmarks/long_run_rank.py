"""Train as one rank of `long_run.py`, and note memory, open files and threads."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

POINTS = 200
KIB_IN_MB = 1024 / 1e6


class Notes(TrainerCallback):
    """Notes memory, files and threads of this process every few steps.

    Attributes:
        curve: a point for each time, with the step.
    """

    def __init__(self, steps: int, every: int) -> None:
        """Note some ``POINTS`` times, and not where something was just evaluated or saved."""
        self.curve: list[dict[str, float]] = []
        self._stride = max(1, steps // POINTS)
        self._every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a point."""
        step = state.global_step
        if step % self._stride == 0 and self._every // 4 <= step % self._every:
            gc.collect()
            status = Path("/proc/self/status").read_text().splitlines()
            facts = dict(line.split(":", 1) for line in status if ":" in line)
            self.curve.append(
                {
                    "step": step,
                    "resident_mb": int(facts["VmRSS"].split()[0]) * KIB_IN_MB,
                    "files": len(os.listdir("/proc/self/fd")),
                    "threads": int(facts["Threads"]),
                }
            )


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute the share of tokens that were predicted rightly."""
    right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(np.mean(right))}


def main() -> None:
    """Train; write the curve of this rank."""
    settings = json.loads(sys.argv[1])
    from dstrain import Trainer, TrainingArguments

    folder, every, steps = Path(settings["folder"]), settings["every"], settings["steps"]
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_hidden_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (4096, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    notes = Notes(steps, every)
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            str(folder / "run"), zero_stage=str(settings["stage"]), max_steps=steps,
            per_device_train_batch_size=2, logging_steps=50, save_strategy="steps",
            save_steps=every, save_total_limit=2, eval_strategy="steps", eval_steps=every,
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data[:32],
        compute_metrics=accuracy,
        callbacks=[notes],
    )  # fmt: skip
    trainer.train()
    trainer.close()
    (folder / f"curve-{os.environ['RANK']}.json").write_text(json.dumps(notes.curve))


if __name__ == "__main__":
    main()
