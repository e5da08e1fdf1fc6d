"""Evaluate and train in any order, any number of times, at every stage; and where it must stop."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.distributed.runs import STAGES, losses, make_trainer
from tests.models import (
    RaggedTokens,
    RegressionModel,
    pad_collate,
    tiny_llama,
    tiny_llama_config,
)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_evaluate_and_train_in_any_order(stage: int, tmp_path: Path) -> None:
    """Evaluate before train, after it, train again: one model, whose weights carry over."""
    trainer = make_trainer(tmp_path, stage=stage, evaluation=RaggedTokens(16))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = trainer.evaluate()["eval_loss"]
    first = losses(trainer)
    assert trained < before
    trainer.train()
    again = trainer.evaluate()["eval_loss"]
    assert again < trained
    second = losses(trainer)[len(first) :]
    assert len(second) == len(first)
    assert second[0] < first[0]
    trainer.close()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(again, rel=1e-6)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_evaluating_before_training_changes_nothing(stage: int, tmp_path: Path) -> None:
    """The curve is the same with and without an evaluation first, in 16 bits as well."""
    plain = make_trainer(tmp_path, stage=stage, bf16=True)
    plain.train()
    plain.close()
    evaluated = make_trainer(tmp_path, stage=stage, bf16=True, eval_on_start=True)
    evaluated.evaluate()
    evaluated.train()
    assert losses(evaluated) == losses(plain)
    evaluated.close()


@pytest.mark.ranks(2)
def test_a_loss_whose_memory_is_used_again_is_logged_as_it_was(tmp_path: Path) -> None:
    """As a CUDA graph does (torch_compile_mode="reduce-overhead"): losses are read steps later."""
    logged = []
    for again in (False, True):
        trainer = make_trainer(
            tmp_path / str(again), gradient_accumulation_steps=2, train=32, logging_steps=2
        )
        step, place = trainer.training_step, torch.zeros(())

        def in_one_place(*args: Any, step: Any = step, place: Any = place, **kwargs: Any) -> Any:
            return place.copy_(step(*args, **kwargs))

        if again:
            trainer.training_step = in_one_place
        trainer.train()
        trainer.close()
        logged.append(losses(trainer))
    assert len(set(logged[0])) == len(logged[0]) > 1
    assert logged[1] == logged[0]


@pytest.mark.ranks(2)
def test_a_plain_module_trains_and_evaluates(tmp_path: Path) -> None:
    """Any module that returns a tuple with its loss works; float labels count by samples."""
    from dstrain import Trainer, TrainingArguments

    draw = torch.Generator().manual_seed(0)
    xs = torch.randn(24, 8, generator=draw)
    data = [{"x": x, "labels": x.sum()} for x in xs]
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        num_train_epochs=8,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(RegressionModel(), args, train_dataset=data, eval_dataset=data[:5])
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        columns = [torch.stack([d[name] for d in data[:5]]) for name in ("x", "labels")]
        expected = RegressionModel()(*columns)[0].item()
    assert before == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    trainer.close()


class TokenStream(IterableDataset[Any]):
    """The ragged samples as a stream without a length."""

    def __init__(self, num_samples: int) -> None:
        self.data = RaggedTokens(num_samples)

    def __iter__(self) -> Any:
        return iter(self.data.examples)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_trains_like_its_samples_in_order(workers: int, tmp_path: Path) -> None:
    """Each rank reads the stream and keeps its share; several passes; a ragged end."""
    from dstrain import Trainer, TrainingArguments
    from tests.parity.reference import _num_targets

    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=0.0,
        logging_steps=1,
        dataloader_num_workers=workers,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_llama(), args, data_collator=pad_collate, train_dataset=TokenStream(9))
    trainer.train()
    data, expected = RaggedTokens(9), []
    for first in (0, 4, 8):
        batch = pad_collate([data[i] for i in range(first, min(first + 4, 9))])
        assert _num_targets(batch)
        with torch.no_grad():
            expected.append(tiny_llama()(**batch).loss.item())
    assert losses(trainer) == pytest.approx(expected * 2, rel=1e-5)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_is_gone_after_close(stage: int, tmp_path: Path) -> None:
    """DeepSpeed leaves hooks that keep master weights and moments alive for ever."""
    trainer = make_trainer(tmp_path, stage=stage, max_steps=1)
    hooks = _num_hooks(trainer.model)
    trainer.evaluate()
    for _ in range(2):
        trainer.train()
        alive = [weakref.ref(trainer.deepspeed), weakref.ref(trainer.optimizer)]
    trainer.close()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    trainer.close(whole=True)  # while a model is partitioned, a hook says what cannot be done
    assert _num_hooks(trainer.model) == hooks


def _num_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_the_device_is_not_synchronised_between_logs(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's throughput timer does it at every forward pass unless it is turned off."""
    from deepspeed.accelerator import get_accelerator

    calls: list[int] = []
    trainer = make_trainer(
        tmp_path, stage=stage, train=48, max_steps=10, logging_steps=10, evaluation=0
    )
    monkeypatch.setattr(
        type(get_accelerator()),
        "synchronize",
        lambda self, *args: calls.append(trainer.state.global_step),
    )
    trainer.train()
    assert [step for step in calls if 0 < step < 10] == []
    monkeypatch.undo()
    trainer.close()


@pytest.mark.ranks(2)
def test_a_loader_that_is_not_shared_out_is_refused(tmp_path: Path) -> None:
    """transformers would share it out; here every rank would train on everything."""
    from torch.utils.data import DataLoader, DistributedSampler

    from dstrain import Trainer
    from dstrain.core.errors import DataError

    data = RaggedTokens(8)

    class OwnLoader(Trainer):
        sampler: Any = None

        def get_train_dataloader(self) -> Any:
            return DataLoader(data, batch_size=2, collate_fn=pad_collate, sampler=self.sampler)

    trainer = make_trainer(tmp_path, cls=OwnLoader)
    with pytest.raises(DataError, match="not shared out"):
        trainer.train()
    trainer.sampler = DistributedSampler(data)
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.close()


@pytest.mark.ranks(2)
def test_a_model_built_in_partitioned_is_partitioned(tmp_path: Path) -> None:
    """From the Python API too a model need not exist whole; outside the block it does.

    It has the weights of a whole model from the same seed, and trains alike.
    """
    from transformers import AutoModelForCausalLM

    import dstrain
    from dstrain import TrainingArguments
    from dstrain.engine import is_partitioned

    torch.manual_seed(5)
    with dstrain.partitioned(TrainingArguments(str(tmp_path), zero_stage="3")):
        model = AutoModelForCausalLM.from_config(tiny_llama_config())
    assert all(is_partitioned(p) for p in model.parameters())
    torch.manual_seed(5)
    outside = AutoModelForCausalLM.from_config(tiny_llama_config())
    assert not any(is_partitioned(p) for p in outside.parameters())
    curves = []
    for built in (model, outside):
        trainer = make_trainer(tmp_path, stage=3, model=built)
        trainer.train()
        curves.append(losses(trainer))
        trainer.close()
    assert curves[0] == curves[1]


@pytest.mark.ranks(1)
def test_several_evaluation_sets_have_their_names_in_the_metrics(tmp_path: Path) -> None:
    """A dict of datasets, as documented."""
    sets = {"a": RaggedTokens(3, seed=1), "b": RaggedTokens(5, seed=2)}
    metrics = make_trainer(tmp_path, evaluation=sets).evaluate()
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]


@pytest.mark.ranks(1)
def test_an_override_that_nothing_calls_is_refused(tmp_path: Path) -> None:
    """A subclass that is written for transformers must not be ignored in part."""
    from dstrain import Trainer
    from dstrain.core.errors import ConfigError

    class Own(Trainer):
        def _get_train_sampler(self) -> None: ...

    with pytest.raises(ConfigError, match="overrides _get_train_sampler"):
        make_trainer(tmp_path, cls=Own)
