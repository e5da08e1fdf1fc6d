"""Train as one rank of `scale.py`, and count the objects that ranks exchange in each part."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

STEPS, LOG_AT, EVALUATE_AT, SAVE_AT = 16, 5, 10, 15


class Exchanges:
    """Counts the gathers and broadcasts of objects, and the bytes that this rank puts into them.

    Attributes:
        part: the part of the run at present.
        counts: part -> [gathers, bytes of these, broadcasts, bytes of these].
    """

    def __init__(self) -> None:
        """Count from now on."""
        self.part = "the constructor"
        self.counts: dict[str, list[int]] = {}
        self._replace("all_gather_object", 0, lambda args: args[1])
        self._replace("gather_object", 0, lambda args: args[0])
        self._replace("broadcast_object_list", 2, lambda args: args[0])

    def _replace(self, name: str, column: int, sent: Callable[[Any], Any]) -> None:
        original = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            row = self.counts.setdefault(self.part, [0, 0, 0, 0])
            row[column] += 1
            row[column + 1] += len(pickle.dumps(sent(args)))
            return original(*args, **kwargs)

        setattr(dist, name, counted)


class Parts(TrainerCallback):
    """Tells which part of the training it is."""

    def __init__(self, exchanges: Exchanges) -> None:
        """Tell these."""
        self._exchanges = exchanges

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the step that begins by what follows it."""
        events = {LOG_AT: "a step with a log", EVALUATE_AT: "a step with an evaluation"}
        events |= {SAVE_AT: "a step with a save", 2: "the second step", STEPS: "the last step"}
        step = state.global_step + 1
        self._exchanges.part = events.get(step, "any other step" if step > 1 else "the first step")


def main() -> None:
    """Train a tiny model; rank 0 prints the counts."""
    settings = json.loads(sys.argv[1])
    exchanges = Exchanges()
    from dstrain import Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=settings["layers"],
    )  # fmt: skip
    data = [{"input_ids": torch.arange(8) % 64, "labels": torch.arange(8) % 64} for _ in range(64)]
    with tempfile.TemporaryDirectory() as mine:
        folders = [mine]
        dist.init_process_group("gloo")
        dist.broadcast_object_list(folders)
        exchanges.counts.clear()
        trainer = Trainer(
            LlamaForCausalLM(config),
            TrainingArguments(
                folders[0], zero_stage=str(settings["stage"]), max_steps=STEPS, save_async=False,
                per_device_train_batch_size=1, logging_steps=LOG_AT, save_strategy="steps",
                save_steps=SAVE_AT, eval_strategy="steps", eval_steps=EVALUATE_AT,
                report_to="none", disable_tqdm=True, logging_first_step=False,
            ),
            train_dataset=data,
            eval_dataset=data[:4],
            callbacks=[Parts(exchanges)],
        )  # fmt: skip
        exchanges.part = "the start of train()"
        trainer.train()
        parameters = sum(1 for _ in trainer.model.parameters())
        if os.environ["RANK"] == "0":
            result = {"parameters": parameters, "counts": exchanges.counts}
            Path(settings["result"]).write_text(json.dumps(result))
        trainer.close()
        dist.barrier()


if __name__ == "__main__":
    main()
