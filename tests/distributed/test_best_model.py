"""The best model: which checkpoint it is, that it stays, and that its weights come back exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import make_trainer, whole_weights
from tests.models import RaggedTokens, tiny_llama

SCORES = {2: 0.1, 4: 0.9, 6: 0.5}


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def scored(folder: Path, scores: dict[int, float] = SCORES, **settings: Any) -> Any:
    """Return a trainer whose evaluations have a score that the test decides."""
    from dstrain import Trainer

    class Scored(Trainer):
        def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
            return {f"{prefix}_score": scores.get(self.state.global_step, 0.0)}

    common: dict[str, Any] = {
        "cls": Scored,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "metric_for_best_model": "score",
    }
    return make_trainer(folder, **{**common, **settings})


def steps_of(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that the main rank sees."""
    from dstrain.checkpoint import committed
    from dstrain.core.ranks import barrier, gather_objects

    barrier()
    return gather_objects([found.step for found in committed(folder)])[0]


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}}
CASES: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (0, {"bf16": True}),
    (1, {"bf16": True, "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}),
    (3, {"bf16": True, "offload_optimizer": "cpu", "offload_param": "cpu"}),
    (2, {"bf16": True, "offload_optimizer": "cpu", "save_weights_with_checkpoint": False}),
    (0, {"deepspeed": FP16}),
    (2, {"deepspeed": FP16}),
    (3, {"deepspeed": FP16}),
    (1, {"bf16": True, "save_only_model": True}),
    (3, {"bf16": True, "save_only_model": True}),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("stage", "settings"), CASES, ids=str)
def test_the_best_weights_come_back_and_nothing_else(
    stage: int, settings: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """Bit for bit those of step 4; optimizer, schedule, counters and scale stay those of step 6."""
    from safetensors import safe_open
    from transformers import TrainerCallback

    from dstrain.checkpoint.content import rank_slices

    seen: dict[int, Any] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            scale = trainer._engines.training.state.loss_scale()
            seen[state.global_step] = whole_weights(trainer), scale

    trainer = scored(
        tmp_path,
        stage=stage,
        model=tiny_llama(tie_word_embeddings=True),
        callbacks=[Watch],
        load_best_model_at_end=True,
        **settings,
    )
    trainer.train()
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (0.9, 4)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    now = whole_weights(trainer)
    for name, weights in seen[4][0].items():
        assert torch.equal(now[name], weights), name
    assert not torch.equal(now["model.norm.weight"], seen[6][0]["model.norm.weight"])
    engine = trainer._engines.training
    assert (state.global_step, trainer.deepspeed.global_steps) == (6, 6)
    assert engine.state.loss_scale() == seen[6][1]
    assert trainer.lr_scheduler.last_epoch == 6 - trainer.deepspeed.skipped_steps
    if not settings.get("save_only_model"):
        own = {t.name: t.load().clone() for t in rank_slices(engine, trainer.ranks).tensors}
        for step, kinds in ((4, ("master", "weight")), (6, ("exp_avg", "exp_avg_sq"))):
            file = tmp_path / f"checkpoint-{step}/state/rank-{rank:05d}.safetensors"
            with safe_open(file, "pt") as saved:
                for name in saved.keys():  # noqa: SIM118 - a file is no dict
                    if name.partition("/")[0] in kinds:
                        assert torch.equal(saved.get_tensor(name), own[name]), (step, name)
    logged = [e["eval_loss"] for e in state.log_history if "eval_loss" in e]
    assert trainer.evaluate()["eval_loss"] == logged[1]
    trainer.save_model()
    best = tmp_path / "checkpoint-4/model.safetensors"
    if best.exists():
        with safe_open(best, "pt") as there, safe_open(tmp_path / best.name, "pt") as here:
            for name in there.keys():  # noqa: SIM118
                assert torch.equal(there.get_tensor(name), here.get_tensor(name)), name
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    """The best and the last, whatever the limit; with save_strategy best the new bests alone."""
    trainer = scored(
        tmp_path / "limit", {2: 0.9}, save_total_limit=1, load_best_model_at_end=True, max_steps=8
    )
    trainer.train()
    trainer.close()
    assert steps_of(tmp_path / "limit") == [2, 8]
    trainer = scored(tmp_path / "best", {1: 0.2, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.1}, eval_steps=1,
                     save_strategy="best", max_steps=5)  # fmt: skip
    trainer.train()
    trainer.close()
    assert steps_of(tmp_path / "best") == [1, 4]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "best/checkpoint-4")


@pytest.mark.ranks(2, timeout=300)
def test_the_best_of_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Step 6 is best, and has no checkpoint; of the others step 8 is better than step 4."""
    trainer = scored(
        tmp_path, {2: 0.1, 4: 0.5, 6: 0.9, 8: 0.7}, save_steps=4, load_best_model_at_end=True,
        max_steps=8,
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (6, 0.9)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_that_could_not_be_written_is_not_the_best(
    asynchronous: bool, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one before it takes its place, and is still there."""
    from dstrain.checkpoint import capture

    real = capture.write_tensor_file

    def sometimes(path: Path, *args: Any) -> Any:
        if rank == 1 and "checkpoint-4." in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *args)

    monkeypatch.setattr(capture, "write_tensor_file", sometimes)
    trainer = scored(
        tmp_path, {2: 0.3, 4: 0.9, 6: 0.1}, save_failure="continue", save_total_limit=1,
        load_best_model_at_end=True, save_async=asynchronous,
    )  # fmt: skip
    trainer.train()
    trainer.close()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert steps_of(tmp_path) == [2, 6]


@pytest.mark.ranks(2, timeout=300)
def test_early_stopping_stops_and_the_best_model_is_loaded(tmp_path: Path) -> None:
    """Two evaluations in a row without a better score."""
    from transformers import EarlyStoppingCallback

    trainer = scored(
        tmp_path, {1: 0.2, 2: 0.3, 3: 0.1, 4: 0.2}, eval_steps=1, save_steps=1, max_steps=8,
        load_best_model_at_end=True, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    assert trainer.train().global_step == 4
    assert trainer.state.best_global_step == 2
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_several_evaluation_sets_and_a_missing_metric(tmp_path: Path) -> None:
    """A metric is named with its set; a wrong name is an error that lists the right ones."""
    from dstrain.checkpoint import committed, read_manifest
    from dstrain.core.errors import ConfigError

    sets = {"a": RaggedTokens(5, seed=7), "b": RaggedTokens(6, seed=8)}
    settings = {"max_steps": 2, "evaluation": sets, "load_best_model_at_end": True}
    trainer = scored(tmp_path, metric_for_best_model="b_loss", greater_is_better=False, **settings)
    trainer.train()
    trainer.close()
    metrics = read_manifest(committed(tmp_path)[0].folder).metrics
    assert trainer.state.best_metric == metrics["eval_b_loss"]
    assert "eval_a_loss" in metrics
    trainer = scored(tmp_path, metric_for_best_model="loss", **settings)
    with pytest.raises(ConfigError, match=r"(?s)no 'eval_loss'.*eval_a_loss.*eval_b_score"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_resumed_run_knows_the_best_of_the_run_before(
    tmp_path: Path, rank: int, caplog: Any
) -> None:
    """Also where the folders were moved; not where another metric is asked for."""
    from dstrain.core.ranks import barrier

    first, moved = tmp_path / "first", tmp_path / "moved"
    scores = {2: 0.9, 4: 0.1, 6: 0.5, 8: 0.6}
    trainer = scored(first, scores, max_steps=4, save_total_limit=2)
    trainer.train()
    trainer.close()
    if rank == 0:
        shutil.move(first, moved)
    barrier()
    trainer = scored(moved, scores, max_steps=8, save_total_limit=2, load_best_model_at_end=True)
    trainer.train(True)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 2)
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-2")
    assert steps_of(moved) == [2, 8]
    trainer.close()
    caplog.clear()
    trainer = scored(
        moved, scores, max_steps=10, metric_for_best_model="loss", greater_is_better=False
    )
    trainer.train(True)
    assert trainer.state.best_global_step == 10
    assert ("chose its best model by another" in caplog.text) is (rank == 0)
    trainer.close()
