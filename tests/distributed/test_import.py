"""Runs of DeepSpeed and of transformers that go on in dstrain, and back, on the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tests.distributed.runs import losses, make_trainer
from tests.models import VOCAB_SIZE, tiny_llama

SAMPLES, BATCH, SAVED, STEPS = 64, 4, 4, 8


class Even(Dataset[dict[str, torch.Tensor]]):
    """Samples of one length, all of it targets: every way to average a loss is the same."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(3, VOCAB_SIZE, (SAMPLES, 12), generator=draw)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def loader() -> DataLoader[Any]:
    """Make a loader of two samples per rank and step, in order."""
    data = Even()
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))


def model(kind: str) -> Any:
    """Return a llama; a "mixed" one has tied, frozen and never touched tensors too."""
    made = tiny_llama(tie_word_embeddings=kind == "mixed")
    if kind == "mixed":
        made.model.layers[0].requires_grad_(False)
        made.register_buffer("seen", torch.zeros(3))
    return made


def with_other_values(made: Any) -> Any:
    """Change the model's values, none of which may survive the resume."""
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point() and tensor.numel() != 8:  # not the rotary frequencies
                tensor.add_(0.5)
    return made


def groups(made: Any) -> list[dict[str, Any]]:
    """Make groups with and without weight decay, as transformers' Trainer does."""
    trained = [p for p in made.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]


def schedule(optimizer: Any) -> Any:
    from transformers import get_scheduler

    return get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=STEPS)


def train_by_hand(folder: Path, kind: str, config: dict[str, Any]) -> list[float]:
    """Train with DeepSpeed alone, save after ``SAVED`` steps, go on; return all ranks' losses."""
    import deepspeed

    made = model(kind)
    if kind == "mixed":
        made.seen.fill_(7.0)
    engine, *_ = deepspeed.initialize(
        model=made, model_parameters=groups(made), config=config, lr_scheduler=schedule
    )
    found = by_hand(engine, to_step=SAVED)
    engine.save_checkpoint(str(folder), client_state={"epochs": 0})
    found += by_hand(engine, from_step=SAVED)
    engine.destroy()
    return found


def by_hand(engine: Any, *, from_step: int = 0, to_step: int = STEPS) -> list[float]:
    """Run DeepSpeed's plain loop over some of the batches; return the losses of all ranks."""
    import torch.distributed as dist

    found = []
    for step, batch in enumerate(loader()):
        if from_step <= step < to_step:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float()
            dist.all_reduce(mean)
            found.append(mean.item() / dist.get_world_size())
    return found


def train_on(folder: Path, start: Path | None, kind: str, stage: int, **settings: Any) -> Any:
    """Train with dstrain from ``start`` on, or from the beginning; return the trainer."""
    from dstrain import Trainer

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> Any:
            return loader()

    trainer = make_trainer(
        folder,
        stage=stage,
        model=model(kind) if start is None else with_other_values(model(kind)),
        cls=SameBatches,
        max_steps=STEPS,
        warmup_steps=2,
        weight_decay=0.1,
        evaluation=0,
        **settings,
    )
    trainer.train(False if start is None else str(start))
    return trainer


def imported(source: Path, out: Path, rank: int, **more: Any) -> Any:
    """Import on rank 0, as the command does, and wait for it on the others."""
    from dstrain.checkpoint import import_checkpoint
    from dstrain.core.ranks import barrier

    done = import_checkpoint(source, out, samples_per_epoch=SAMPLES, **more) if rank == 0 else None
    barrier()
    return done


CASES = [
    (0, 2, "plain", {}),
    (1, 3, "plain", {}),
    (2, 0, "mixed", {}),
    (3, 1, "mixed", {}),
    (3, 3, "mixed", {"bf16": {"enabled": True}}),
    (0, 1, "plain", {"bf16": {"enabled": True}}),
]


@pytest.mark.ranks(2, timeout=240)
def test_a_run_of_deepspeed_goes_on_at_another_stage(tmp_path: Path, rank: int) -> None:
    """From every stage: the losses are those of the run that went on in DeepSpeed."""
    from dstrain.checkpoint import verify

    for number, (stage, other, kind, more) in enumerate(CASES):
        folder = tmp_path / str(number)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "gradient_clipping": 1.0,
            **more,
        }
        whole = train_by_hand(folder / "theirs", kind, config)
        done = imported(folder / "theirs", folder / "ours/checkpoint-4", rank)
        if rank == 0:
            assert (done.step, f"ZeRO stage {stage}" in done.kind) == (SAVED, True)
            assert verify(folder / "ours/checkpoint-4")[1] == []
        trainer = train_on(
            folder / "ours", folder / "ours/checkpoint-4", kind, other, bf16="bf16" in more
        )
        tolerance = 2e-3 if more else 2e-5
        assert losses(trainer) == pytest.approx(whole[SAVED:], rel=tolerance), (stage, other)
        rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
        assert rates == pytest.approx([1e-3 * k / 6 for k in (4, 3, 2, 1)])
        if kind == "mixed":
            assert trainer.model.seen.tolist() == [7.0] * 3
        trainer.close()


@pytest.mark.ranks(2, timeout=120)
def test_a_run_of_transformers_without_deepspeed_goes_on(tmp_path: Path, rank: int) -> None:
    """The files are those of its Trainer; losses, history and place in the data go on."""
    made, found = model("plain"), []
    optimizer = torch.optim.AdamW(groups(made), lr=1e-3)
    rates, data = schedule(optimizer), Even()
    folder = tmp_path / "theirs/checkpoint-4"
    history = []
    for step in range(STEPS):
        if step == SAVED and rank == 0:
            made.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(rates.state_dict(), folder / "scheduler.pt")
            state = {"global_step": SAVED, "epoch": SAVED * BATCH / SAMPLES, "train_batch_size": 4}
            state["log_history"] = history
            (folder / "trainer_state.json").write_text(json.dumps(state))
        index = range(step * BATCH, step * BATCH + BATCH)
        batch = torch.utils.data.default_collate([data[i] for i in index])
        loss = made(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        found.append(loss.item())
        history.append({"loss": loss.item(), "step": step + 1, "epoch": (step + 1) / 16})
    done = imported(folder, tmp_path / "ours/checkpoint-4", rank)
    if rank == 0:
        assert any("a global batch of 4 samples" in remark for remark in done.remarks)
    trainer = train_on(tmp_path / "ours", tmp_path / "ours/checkpoint-4", "plain", 3)
    assert losses(trainer) == pytest.approx(found, rel=2e-5)  # the first four are its history
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == list(range(1, 9))
    assert trainer.state.epoch == pytest.approx(0.5)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_converted_run_goes_on_in_deepspeed(tmp_path: Path, rank: int) -> None:
    """DeepSpeed's own engine, at each of its stages, has the losses of the run that stayed here."""
    import deepspeed

    from dstrain.checkpoint import convert
    from dstrain.core.ranks import barrier

    for stage, others, kind, more in (
        (2, (1, 3), "plain", {}),
        (3, (2,), "plain", {"bf16": {"enabled": True}}),
    ):
        folder = tmp_path / str(stage)
        whole = train_on(
            folder / "ours", None, kind, stage, bf16=bool(more), save_strategy="steps", save_steps=4
        )
        expected = losses(whole)
        whole.close()
        done = convert(folder / "ours/checkpoint-4", folder / "theirs") if rank == 0 else None
        barrier()
        assert done is None or done.num_parameters == 21
        for other in others:
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": other},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "gradient_clipping": 1.0,
                "checkpoint": {"load_universal": True},
                **more,
            }
            made = with_other_values(model(kind))
            engine, *_ = deepspeed.initialize(
                model=made, model_parameters=groups(made), config=config, lr_scheduler=schedule
            )
            path, state = engine.load_checkpoint(str(folder / "theirs"))
            assert (path is not None, state["dstrain"]["step"]) == (True, SAVED)
            assert engine.global_steps == SAVED
            found = by_hand(engine, from_step=SAVED)
            assert found == pytest.approx(expected[SAVED:], rel=2e-3 if more else 2e-5), other
            decays = {g["weight_decay"] for g in engine.optimizer.param_groups}
            assert decays == {0.1, 0.0}
            engine.destroy()
