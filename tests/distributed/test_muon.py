"""Muon under ZeRO: the norm of true gradients, saving, and going on at another stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer
from tests.models import tiny_llama

STEPS, SAVED_AT, CLIP = 6, 3, 0.3
# Stage 0 takes the mean over ranks in another order; Newton-Schulz enlarges that.
TOLERANCE = 1e-4
PLACES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2 cpu": {"stage": 2, "offload_optimizer": "cpu"},
    "3": {"stage": 3},
    "3 cpu": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Keep DeepSpeed's Muon from compiling its steps, which takes minutes on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trained(folder: Path, *, resume: str | None = None, **settings: Any) -> Any:
    """Train six steps of two micro-batches by Muon, saving after the third."""
    common: dict[str, Any] = {
        "model": tiny_llama(), "optim": "muon", "learning_rate": 2e-3, "max_grad_norm": CLIP,
        "max_steps": STEPS, "train": 48, "evaluation": 0, "gradient_accumulation_steps": 2,
        "save_strategy": "steps", "save_steps": SAVED_AT,
    }  # fmt: skip
    trainer = make_trainer(folder, **{**common, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def norms(trainer: Any) -> list[float]:
    """Return the logged gradient norms."""
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.ranks(2, timeout=300)
def test_every_stage_reports_and_clips_true_gradients(tmp_path: Path) -> None:
    """Losses and norms are those of stage 0, and a checkpoint of each goes on in the next."""
    runs = {name: trained(tmp_path / name, **place) for name, place in PLACES.items()}
    plain = runs["0"]
    assert min(norms(plain)) > 2 * CLIP
    wrong = {}
    for name, run in runs.items():
        if losses(run) != pytest.approx(losses(plain), rel=TOLERANCE):
            wrong[name] = losses(run), losses(plain)
        if norms(run) != pytest.approx(norms(plain), rel=1e-2):
            wrong[f"{name}: norms"] = norms(run), norms(plain)
        run.close()
    assert not wrong
    names = list(PLACES)
    for saved, goes_on in zip(names, [*names[1:], names[0]], strict=True):
        checkpoint = str(tmp_path / saved / f"checkpoint-{SAVED_AT}")
        again = trained(tmp_path / f"from {saved}", resume=checkpoint, **PLACES[goes_on])
        if losses(again) != pytest.approx(losses(plain), rel=TOLERANCE):
            wrong[f"{saved} -> {goes_on}"] = losses(again), losses(plain)
        again.close()
    assert not wrong


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_in_bf16_goes_on_to_the_bit(stage: int, tmp_path: Path) -> None:
    """The momentum is in fp32 there too."""
    whole = trained(tmp_path / "whole", stage=stage, bf16=True)
    whole.close()
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}")
    again = trained(tmp_path / "again", resume=checkpoint, stage=stage, bf16=True)
    assert losses(again) == losses(whole)
    again.close()
