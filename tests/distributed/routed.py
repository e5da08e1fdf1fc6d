"""A model that runs other parts for other samples, trained by a Trainer and by plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.distributed.runs import whole_weights

WIDTH, ROWS, RATE, DECAY, CLIP = 8, 24, 1e-2, 0.1, 0.5

# Which blocks a sample runs, in which order, and by which head it is judged. Neighbours differ, so
# that ranks do; some windows of 1 and of 3 leave blocks out on all ranks, or in the last
# micro-batch only.
ROUTES = (
    ((0, 1), 0), ((1, 0), 1), ((2,), 0), ((), 1), ((0,), 0), ((0, 1, 2), 0), ((), 0), ((), 0),
    ((1, 2), 1), ((2, 1), 0), ((0, 1), 1), ((1,), 1),
)  # fmt: skip


class Routed(nn.Module):
    """Blocks and heads of which each sample uses some; ``unused`` is for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(5, 3)
        self.head = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))
        self.body = nn.Linear(WIDTH, WIDTH)
        self.block = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 40), nn.Tanh(), nn.Linear(40, WIDTH)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        blocks, head = ROUTES[int(route)]
        for number in blocks:
            hidden = hidden + self.block[number](hidden)
        return {"loss": functional.mse_loss(self.head[head](hidden).squeeze(-1), labels)}


def data() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(WIDTH, generator=draw),
            "route": torch.tensor(number % len(ROUTES)),
            "labels": torch.randn((), generator=draw),
        }
        for number in range(ROWS)
    ]


def trainer_of(folder: Path, model: nn.Module, **arguments: Any) -> Any:
    from dstrain import Trainer, TrainingArguments

    evaluation = arguments.pop("evaluation", None)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": RATE,
        "weight_decay": DECAY, "lr_scheduler_type": "constant", "max_grad_norm": CLIP,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, **arguments,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings)
    return Trainer(model, args, train_dataset=data(), eval_dataset=evaluation)


def global_batches(size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    from dstrain.data import EpochOrder

    order, rows = EpochOrder(ROWS, seed=42, shuffle=True).indices(0).tolist(), data()
    for first in range(0, ROWS, size):
        yield [rows[k] for k in order[first : first + size]]


def plain_torch(model: nn.Module, size: int) -> list[tuple[float, float]]:
    """Train in one process over global batches; return loss and gradient norm of every step."""
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "bias" not in n], "weight_decay": DECAY},
            {"params": [p for n, p in named.items() if "bias" in n], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    found = []
    for batch in global_batches(size):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)  # a missing one counts as zeros
        samples = [{k: v[None] for k, v in row.items()} for row in batch]
        loss = sum(model(**sample)["loss"] for sample in samples) / size
        loss.backward()
        norm = nn.utils.clip_grad_norm_(named.values(), CLIP)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def steps(trainer: Any) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def zero(**values: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": values}}


OFFLOAD = {"offload_optimizer": "cpu"}


def check(
    folder: Path, arguments: dict[str, Any], model: type[nn.Module] = Routed, rel: float = 2e-4
) -> None:
    """Train both ways; losses, norms and weights must be the same."""
    import torch.distributed as dist

    accumulation = arguments.get("gradient_accumulation_steps", 1)
    twin = model()
    expected = plain_torch(twin, dist.get_world_size() * accumulation)
    trainer = trainer_of(folder, model(), **arguments)
    trainer.train()
    found, weights = steps(trainer), whole_weights(trainer)
    trainer.close()
    assert found == [pytest.approx(step, rel=rel, abs=1e-6) for step in expected], arguments
    if arguments.get("bf16"):
        return  # Adam moves by the rate in either direction where a gradient is but rounding
    for name, values in twin.named_parameters():
        assert torch.allclose(weights[name], values, atol=5 * rel * RATE), (name, arguments)


class RoutedByRank(Routed):
    """Routes of each step are given, for rank 0 and rank 1."""

    def __init__(self, *routes: tuple[int, int]) -> None:
        super().__init__()
        self.routes, self.calls = routes, 0

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        import torch.distributed as dist

        given = self.routes[min(self.calls, len(self.routes) - 1)][dist.get_rank()]
        self.calls += 1
        return super().forward(x, torch.tensor([given]), labels)
