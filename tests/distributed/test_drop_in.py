"""What scripts and subclasses written for transformers' Trainer look up, call and expect."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest
import transformers

from dstrain.checkpoint.run_lock import RUN_LOCK
from dstrain.core.errors import CheckpointError, TrainingError
from tests.distributed.runs import make_trainer
from tests.models import tiny_llama


def small() -> Any:
    return tiny_llama(hidden_size=32, intermediate_size=32)


def short(folder: Path, **arguments: Any) -> Any:
    """Return a trainer of two steps."""
    return make_trainer(
        folder, **{"model": small(), "train": 4, "evaluation": 0, "stage": 0, **arguments}
    )


def _public_attributes() -> set[str]:
    """Return everything that transformers' Trainer sets on itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(transformers.Trainer)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and not node.attr.startswith("_")
    }


@pytest.mark.ranks(1)
def test_every_public_name_of_transformers_trainer_is_here_or_says_what_to_use(
    tmp_path: Path,
) -> None:
    """A release with a new one fails here, until somebody says what becomes of it."""
    from dstrain.trainer.attributes import INSTEAD

    names = _public_attributes() | {n for n in dir(transformers.Trainer) if n[0] != "_"}
    assert {"accelerator", "label_smoother", "is_in_train", "get_tp_size"} <= names
    later = {"objective", "compute_objective", "hp_space"}  # of a search
    trainer = short(tmp_path)
    there = {name for name in names if hasattr(trainer, name)}
    assert sorted(names - there - later - INSTEAD.keys()) == []
    assert sorted(there & INSTEAD.keys()) == []
    for name in INSTEAD:
        with pytest.raises(AttributeError, match=f"no attribute '{name}': "):
            getattr(trainer, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'$"):
        trainer.nothing  # noqa: B018


@pytest.mark.ranks(1)
def test_attributes_have_the_values_of_transformers(tmp_path: Path) -> None:
    theirs = transformers.Trainer(
        small(),
        transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True,
                                       label_smoothing_factor=0.1),
        processing_class=None,
    )  # fmt: skip
    trainer = short(tmp_path, label_smoothing_factor=0.1)
    for name in ("label_names", "can_return_loss", "is_fsdp_enabled", "is_model_parallel",
                 "is_fsdp_xla_enabled", "neftune_noise_alpha", "is_in_train"):  # fmt: skip
        assert bool(getattr(trainer, name)) == bool(getattr(theirs, name)), name
    assert trainer.is_deepspeed_enabled
    assert trainer.label_smoother == theirs.label_smoother
    assert short(tmp_path).label_smoother is None
    with pytest.raises(AttributeError, match="override compute_loss"):
        trainer.label_smoother = None


@pytest.mark.ranks(1)
def test_a_step_outside_of_training_says_so(tmp_path: Path) -> None:
    """Before and after; it was an assertion without a text."""
    trainer = short(tmp_path)
    (batch, *_) = trainer.get_train_dataloader()
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"training_step\(\) outside of train\(\)"):
            trainer.training_step(trainer.model, batch)
        trainer.train()
    trainer.close()


@pytest.mark.ranks(1)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_there_are_two_parameter_groups_with_and_without_decay(
    decay: float, tmp_path: Path
) -> None:
    trainer = short(tmp_path, weight_decay=decay, stage=2)
    trainer.train()
    assert len(trainer.get_learning_rates()) == 2
    matrix, norm = trainer.model.lm_head.weight, trainer.model.model.norm.weight
    assert trainer.get_optimizer_group(matrix) is not trainer.get_optimizer_group(norm)
    assert [len(group) > 0 for group in trainer.get_optimizer_group()] == [True, True]
    trainer.close()


@pytest.mark.ranks(1)
def test_arguments_are_what_the_user_wrote_after_every_use(tmp_path: Path) -> None:
    trainer = short(tmp_path, save_strategy="steps", save_steps=1, eval_strategy="no")
    before = dataclasses.asdict(trainer.args)
    trainer.train()
    trainer.save_model()
    trainer.evaluate(trainer.train_dataset)
    trainer.train(trial={"learning_rate": 1e-4})
    trainer.close()
    assert dataclasses.asdict(trainer.args) == before
    assert trainer.args.run_name is None


@pytest.mark.ranks(1)
@pytest.mark.parametrize("quiet", [False, True])
def test_what_shows_progress_goes_by_the_class_of_transformers(quiet: bool, tmp_path: Path) -> None:
    kind = transformers.PrinterCallback if quiet else transformers.ProgressCallback
    trainer = short(tmp_path, disable_tqdm=quiet)
    assert isinstance(trainer.pop_callback(kind), kind)
    assert trainer.pop_callback(kind) is None
    trainer.train()
    trainer.close()


@pytest.mark.ranks(1)
def test_other_arguments_than_the_checkpoints_are_named_on_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = short(tmp_path, **settings)
    trainer.train()
    trainer.close()
    assert not (tmp_path / RUN_LOCK).exists(), "the run has ended"
    changed = {**settings, "save_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 0.5}
    for given, expected in ((settings, 0), (changed, 2)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = short(tmp_path, **given)
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
            again.close()
        said = [r.getMessage() for r in caplog.records if "in the checkpoint" in r.getMessage()]
        said = [text for text in said if not text.startswith("global batch size")]
        assert len(said) == expected, said
    assert "save_steps: 1 in the checkpoint, 2 in this run" in said
    assert "per_device_train_batch_size: 2 in the checkpoint, 1 in this run" in said


@pytest.mark.ranks(1)
def test_no_save_steps_save_after_the_last_step(tmp_path: Path) -> None:
    trainer = short(tmp_path, save_strategy="steps", save_steps=0)
    trainer.train()
    trainer.close()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.ranks(1)
def test_a_checkpoint_of_transformers_is_to_be_imported(tmp_path: Path) -> None:
    """The error names the command, for a folder that is named and for the newest one."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for wanted in (str(folder), True):
        trainer = short(tmp_path)
        with pytest.raises(CheckpointError, match=f"dstrain checkpoint import {folder}"):
            trainer.train(resume_from_checkpoint=wanted)
        with pytest.raises(CheckpointError, match=f"dstrain checkpoint import {folder}"):
            short(
                tmp_path, resume_from_checkpoint=str(wanted).lower() if wanted is True else wanted
            )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_the_folder_of_an_adapter_has_pefts_model_card(
    stage: int, rank: int, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(small(), config)
    trainer = short(tmp_path / "out", model=model, stage=stage, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    mine = tmp_path / "mine"
    if rank == 0:
        mine.mkdir()
        (mine / "README.md").write_text("---\n{: no card\n---\nmine")
    trainer.save_model(str(mine))
    trainer.close()
    if rank == 0:
        assert (mine / "README.md").read_text().endswith("mine")
        assert (mine / "adapter_model.safetensors").is_file()
        for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
            card = (folder / "README.md").read_text()
            assert "library_name: peft" in card
            assert "lora" in card
