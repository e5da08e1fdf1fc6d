"""Where the DeepSpeed config decides a value, that value is what a run shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.distributed.runs import make_trainer


class _Reader(TrainerCallback):  # type: ignore[misc]
    """Notes the arguments that every event is given, and leaves one of its own in them."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}

    def _note(self, event: str, args: Any) -> None:
        self.seen.setdefault(event, args.to_dict())  # what trackers send

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_init_end", args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_train_begin", args)
        args.run_name = "named by a callback"

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_log", args)


class _Batches:
    """A loader that knows its batches, and nothing of samples."""

    def __len__(self) -> int:
        return 5


@pytest.mark.ranks(2)
def test_what_the_config_decided_is_shown_and_the_arguments_stay(tmp_path: Path, rank: int) -> None:
    """Callbacks, state, checkpoint, card and counts; the arguments are at their defaults."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    }
    reader = _Reader()
    trainer = make_trainer(
        tmp_path,
        stage="auto",
        train=24,
        callbacks=[reader],
        deepspeed=config,
        per_device_train_batch_size=8,
        learning_rate=5e-5,
        save_strategy="epoch",
    )
    trainer.train()
    args = trainer.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 1)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (5e-5, 0.0, 1.0)
    assert args.lr_scheduler_type == "linear"
    assert args.run_name == "named by a callback", "what a callback sets is set"
    assert set(reader.seen) == {"on_init_end", "on_train_begin", "on_log"}
    shown = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "zero_stage": "1",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
    }
    for event, seen in reader.seen.items():
        assert {name: seen[name] for name in shown} == shown, event
    assert trainer.state.train_batch_size == 2
    assert trainer.state.global_step == trainer.state.max_steps == 2  # 24 / (2 x 3 x 2 ranks)
    assert trainer.num_examples(trainer.get_train_dataloader()) == 24
    assert trainer.num_examples(_Batches()) == 10
    trainer.create_model_card()
    if rank == 0:
        saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
        assert saved["train_batch_size"] == 2
        card = (tmp_path / "README.md").read_text()
        for row in (
            "| learning_rate | `0.001` |",
            "| per_device_train_batch_size | `2` |",
            "| gradient_accumulation_steps | `3` |",
            "| max_grad_norm | `0.5` |",
            "| weight_decay | `0.1` |",
            "| lr_scheduler_type | `WarmupLR` |",
            "| global batch size | `12` |",
        ):
            assert row in card, card
    trainer.close()


@pytest.mark.ranks(1)
def test_the_card_of_a_run_with_an_optimizer_of_its_own_names_that(tmp_path: Path) -> None:
    import torch

    from tests.models import tiny_llama

    model = tiny_llama()
    own = torch.optim.SGD(model.parameters(), lr=0.25)
    trainer = make_trainer(tmp_path, stage=0, model=model, optimizers=(own, None), max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| optimizer | `SGD` |" in card
    assert "| learning_rate | `0.25` |" in card
    trainer.close()
