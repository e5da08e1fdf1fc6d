"""A model that changes weights in its forward pass: as in torch at stages 0 to 2, named at 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.runs import whole_weights
from tests.distributed.test_formats import data, trainer_of


class Averaging(nn.Module):
    """A student, and a teacher that follows it in every forward pass of training."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.student, self.teacher = nn.Linear(4, 1), nn.Linear(4, 1)
        self.teacher.requires_grad_(False)
        self.way = way

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.follow()
        seen = self.student(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(seen, labels) + 0 * self.teacher(x).mean()}

    @torch.no_grad()
    def follow(self) -> None:
        pairs = list(zip(self.teacher.parameters(), self.student.parameters(), strict=True))
        if self.way == "foreach":
            torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 0.5)
        for teacher, student in pairs if self.way != "foreach" else ():
            if self.way == "data":
                teacher.data.mul_(0.5).add_(student.data, alpha=0.5)
            elif self.way == "gathered":
                import deepspeed

                with deepspeed.zero.GatheredParameters([teacher, student], modifier_rank=0):
                    teacher.mul_(0.5).add_(student, alpha=0.5)
            else:
                teacher.mul_(0.5).add_(student, alpha=0.5)


def by_hand() -> torch.Tensor:
    """Train four steps by plain torch; return the teacher."""
    from torch.utils.data import default_collate

    model = Averaging("parameter")
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        model(**default_collate(data()))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.teacher.weight


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(
    ("stage", "way"), [(0, "parameter"), (2, "data"), (2, "foreach"), (3, "gathered")]
)
def test_a_change_that_reaches_the_parameter_is_that_of_torch(
    stage: int, way: str, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, Averaging(way), stage, save_strategy="no")
    trainer.train()
    torch.testing.assert_close(whole_weights(trainer)["teacher.weight"], by_hand())
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("way", ["parameter", "data", "foreach"])
def test_a_change_that_would_be_lost_ends_the_run(way: str, tmp_path: Path) -> None:
    from dstrain.core.errors import TrainingError

    trainer = trainer_of(tmp_path, Averaging(way), 3, save_strategy="no")
    with pytest.raises(TrainingError, match=r"changes teacher.weight in place"):
        trainer.train()
    trainer.close()
