"""Training written by hand, without dstrain: plain torch, and plain DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tests.models import IGNORE_INDEX, RaggedTokens, pad_collate

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
CLIP = 1.0
GLOBAL_BATCH = 8
EPOCHS = 2


def global_batches(num_samples: int, orders: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield indices of each optimizer step: consecutive pieces of every epoch's order."""
    for order in orders:
        assert sorted(order) == list(range(num_samples))
        for first in range(0, num_samples, GLOBAL_BATCH):
            yield list(order[first : first + GLOBAL_BATCH])


def linear_decay(num_steps: int) -> Any:
    """Compute the factor of the learning rate at a step: from 1 down to 0, no warm-up."""
    return lambda step: max(0.0, (num_steps - step) / num_steps)


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    matrices = [p for n, p in model.named_parameters() if "norm" not in n]
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    return [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]


def _num_targets(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, foreach=False)


def plain_torch(
    model: Any,
    data: RaggedTokens,
    orders: Sequence[Sequence[int]],
    *,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = _adamw,
    clip: float = CLIP,
) -> list[float]:
    """Train in one process by plain torch, a pass per global batch; return each step's loss."""
    steps = list(global_batches(len(data), orders))
    optimizer = make(groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_decay(len(steps)))
    losses = []
    for indices in steps:
        batch = pad_collate([data[i] for i in indices])
        loss = model(**batch).loss  # transformers: mean over targets
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_deepspeed(
    model: Any,
    data: RaggedTokens,
    orders: Sequence[Sequence[int]],
    *,
    stage: int,
    precision: str,
    accumulation: int,
    rank: int,
    world_size: int,
) -> list[float]:
    """Train by a DeepSpeed loop written by hand; return the global mean loss of every step."""
    import deepspeed

    steps = list(global_batches(len(data), orders))
    micro = GLOBAL_BATCH // (accumulation * world_size)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True},
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config=config,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, linear_decay(len(steps))),
    )
    losses = []
    for indices in steps:
        chunk = micro * world_size
        chunks = [indices[i : i + chunk] for i in range(0, len(indices), chunk)]
        mine = []
        for part in chunks:
            assert len(part) % world_size == 0, "the reference knows no ragged chunks"
            share = len(part) // world_size
            mine.append(pad_collate([data[i] for i in part[rank * share : (rank + 1) * share]]))
        total = torch.tensor(float(sum(_num_targets(b) for b in mine)))
        dist.all_reduce(total)
        step_loss = torch.zeros(())
        for position, batch in enumerate(mine):
            loss = engine(**batch).loss * _num_targets(batch) / total
            engine.set_gradient_accumulation_boundary(position == len(mine) - 1)
            engine.backward(loss * world_size, scale_wrt_gas=False)
            step_loss += loss.detach()
        engine.step()
        dist.all_reduce(step_loss)
        losses.append(step_loss.item())
    engine.destroy()
    return losses
