"""A run that goes on with other arguments takes the rates that these say, from its first step on.

The reference is the run that had those arguments from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, make_trainer

SHORT, LONG = 4, 8
Change = tuple[dict[str, Any], dict[str, Any]]  # arguments of the saved run, and of the next one


def deepspeed(kind: str, **params: Any) -> dict[str, Any]:
    return {"deepspeed": {"scheduler": {"type": kind, "params": params}}}


def longer(**settings: Any) -> Change:
    """Return the arguments of a saved run, and of one that goes on with more epochs."""
    return {"num_train_epochs": 1, **settings}, {"num_train_epochs": 2, **settings}


CHANGES: dict[str, Change] = {
    "linear": longer(),
    "linear with warm-up": longer(warmup_ratio=0.3),
    "cosine": longer(lr_scheduler_type="cosine", warmup_steps=2),
    "cosine with restarts": longer(lr_scheduler_type="cosine_with_restarts"),
    "cosine with a floor": longer(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-4}
    ),
    "polynomial": longer(lr_scheduler_type="polynomial"),
    "inverse square root": longer(lr_scheduler_type="inverse_sqrt", warmup_steps=1),
    "warm-up, stable, decay": longer(
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=1,
        lr_scheduler_kwargs={"num_decay_steps": 2},
    ),
    "max_steps": ({"max_steps": SHORT}, {"max_steps": LONG}),
    "another warm-up": (
        {"num_train_epochs": 1, "warmup_steps": 1},
        {"num_train_epochs": 2, "warmup_steps": 7},
    ),
    "another rate": (
        {"lr_scheduler_type": "constant", "max_steps": SHORT},
        {"lr_scheduler_type": "constant", "max_steps": LONG, "learning_rate": 3e-4},
    ),
    "another kind": (
        {"num_train_epochs": 1, "lr_scheduler_type": "linear"},
        {"num_train_epochs": 2, "lr_scheduler_type": "cosine"},
    ),
    "WarmupDecayLR": longer(**deepspeed("WarmupDecayLR", warmup_num_steps=2)),
    "WarmupCosineLR": longer(**deepspeed("WarmupCosineLR", warmup_num_steps=2)),
    "OneCycle": (
        {
            "max_steps": SHORT,
            **deepspeed("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2, cycle_first_step_size=2),
        },
        {
            "max_steps": LONG,
            **deepspeed("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2, cycle_first_step_size=4),
        },
    ),
    "ours instead of DeepSpeed's": (
        {"num_train_epochs": 1, **deepspeed("WarmupDecayLR", warmup_num_steps=2)},
        {"num_train_epochs": 2},
    ),
    "DeepSpeed's instead of ours": (
        {"num_train_epochs": 1},
        {"num_train_epochs": 2, **deepspeed("WarmupDecayLR", warmup_num_steps=2)},
    ),
}


def run(folder: Path, resume: Any = False, **settings: Any) -> list[Any]:
    """Train and save at the end; rate and momenta of the groups at each step."""
    from transformers import TrainerCallback

    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            groups = trainer.deepspeed.optimizer.param_groups
            seen.append([(float(g["lr"]), g.get("betas"), g.get("momentum")) for g in groups])

    schedule: Callable[[Any], Any] | None = settings.pop("schedule", None)
    if schedule is not None:
        from tests.models import tiny_llama

        settings["model"] = model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        settings["optimizers"] = (optimizer, schedule(optimizer))
    trainer = make_trainer(
        folder,
        **{"evaluation": 0, "train": 8 * settings.pop("ranks", 1), "callbacks": [Watch()]},
        **settings,
    )
    assert len(trainer.train_dataset) == 8 * trainer.ranks.world_size
    trainer.train(resume)
    trainer.close()
    return seen


def check(folder: Path, change: Change, **settings: Any) -> None:
    """Check that a resumed run's rates are as if it had had its arguments from the beginning."""
    before, after = change
    whole = run(folder / "whole", **after, **settings)
    saves = {"save_strategy": "steps", "save_steps": SHORT}
    short = run(folder / "resumed", **before, **saves, **settings)
    resumed = run(folder / "resumed", resume=True, **after, **settings)
    assert len(short) == SHORT
    assert len(whole) == LONG
    assert resumed == whole[SHORT:]


@pytest.mark.ranks(1, timeout=120)
@pytest.mark.parametrize("change", CHANGES)
def test_rates_are_those_of_this_runs_arguments(change: str, tmp_path: Path) -> None:
    """More steps, another warm-up, rate or kind; of transformers and of DeepSpeed."""
    check(tmp_path, CHANGES[change])


SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "cosine": lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=total),
    "one cycle": lambda o, total: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=total + 1
    ),
    "milestones": lambda o, total: torch.optim.lr_scheduler.MultiStepLR(o, [total // 2, total]),
    "one after the other": lambda o, total: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=total - 2),
        ],
        [2],
    ),
    "a function": lambda o, total: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 - n / total),
}


@pytest.mark.ranks(1, timeout=120)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_of_the_users_own_is_the_one_that_was_passed(kind: str, tmp_path: Path) -> None:
    """What it was made with counts, not what the checkpoint's was made with."""
    short, long = (lambda o, n=n: SCHEDULES[kind](o, n) for n in (SHORT, LONG))  # type: ignore[misc]
    check(
        tmp_path, ({"max_steps": SHORT, "schedule": short}, {"max_steps": LONG, "schedule": long})
    )


@pytest.mark.ranks(2, timeout=200)
@pytest.mark.parametrize("stage", STAGES)
def test_at_every_stage(stage: int, tmp_path: Path) -> None:
    """A finished epoch goes on with another one."""
    check(tmp_path, longer(warmup_ratio=0.3), stage=stage, ranks=2)


@pytest.mark.ranks(1, timeout=120)
def test_in_deepspeeds_own_layout(tmp_path: Path) -> None:
    """Which brings the saved rates with the optimizer, and another kind of schedule."""
    check(tmp_path, CHANGES["another kind"], checkpoint_format="deepspeed")
    check(tmp_path / "2", CHANGES["DeepSpeed's instead of ours"], checkpoint_format="deepspeed")


@pytest.mark.ranks(1, timeout=120)
def test_what_a_callback_has_made_of_the_rates_stays(tmp_path: Path) -> None:
    """With the same arguments the state comes back, also where it is not what arguments say."""
    from transformers import TrainerCallback

    class Halve(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == 2:
                lr_scheduler.base_lrs = [rate / 2 for rate in lr_scheduler.base_lrs]

    def rates(trainer: Any) -> list[float]:
        return [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]

    settings: dict[str, Any] = {
        "train": 16, "evaluation": 0, "callbacks": [Halve()], "save_strategy": "steps",
        "save_steps": SHORT,
    }  # fmt: skip
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    again = make_trainer(tmp_path / "again", **settings)
    again.train(str(tmp_path / f"checkpoint-{SHORT}"))
    assert rates(again) == rates(whole)
    assert rates(whole)[SHORT] == pytest.approx(1e-3 / 2 * (LONG - SHORT) / LONG)


@pytest.mark.ranks(1, timeout=120)
def test_a_schedule_that_follows_a_metric_keeps_what_it_has_seen(tmp_path: Path) -> None:
    """What it did to the saved run's rate is done to this run's; its other arguments count."""
    settings: dict[str, Any] = {
        "train": 8, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
        "eval_steps": 1, "metric_for_best_model": "loss", "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip
    never = {"patience": 0, "threshold": 0.9}  # nothing is that much better
    short = make_trainer(tmp_path, max_steps=4, lr_scheduler_kwargs=never, **settings)
    short.train()
    reached = short.lr_scheduler.get_last_lr()[0]
    assert reached == pytest.approx(1e-3 * 0.1**3)
    patient = {**never, "patience": 9}
    again = make_trainer(
        tmp_path, max_steps=6, lr_scheduler_kwargs=patient, learning_rate=2e-3, **settings
    )
    again.train(True)
    assert again.lr_scheduler.get_last_lr()[0] == pytest.approx(2 * reached)
    assert again.lr_scheduler.patience == 9
    assert again.lr_scheduler.last_epoch == 6


@pytest.mark.ranks(1, timeout=120)
def test_changed_momenta_count(tmp_path: Path) -> None:
    """Not only rates are arguments; those that nothing changes in training are this run's."""
    run(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    seen = run(tmp_path, resume=True, max_steps=6, adam_beta1=0.5)
    assert [group[1] for group in seen[0]] == [(0.5, 0.999)] * 2
