"""Evaluate and train in any order, any number of times, at every stage; and where it must stop."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights
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
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_trains(stage: int, tmp_path: Path) -> None:
    """The optimizer on the host follows the curve of the one on the device."""
    plain = make_trainer(tmp_path, stage=stage)
    plain.train()
    plain.close()
    offloaded = make_trainer(
        tmp_path,
        stage=stage,
        offload_optimizer="cpu",
        offload_param="cpu" if stage == 3 else "none",
    )
    offloaded.train()
    assert type(offloaded.deepspeed.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    assert losses(offloaded) == pytest.approx(losses(plain), rel=1e-4)
    offloaded.close()


@pytest.mark.ranks(2)
def test_two_parameter_groups_and_the_schedule_of_transformers(tmp_path: Path) -> None:
    """Norms are not decayed; warm-up starts at 0 and each step uses the documented rate."""
    rates: list[float] = []

    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            rates.append(kw["optimizer"].param_groups[0]["lr"])

    trainer = make_trainer(
        tmp_path, train=20, weight_decay=0.1, warmup_steps=2, callbacks=[Recorder]
    )
    trainer.train()
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
    # 5 steps, 2 of warm-up: linear to the peak, then to 0.
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged == pytest.approx(rates)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_users_own_optimizer_and_schedule_run(stage: int, tmp_path: Path) -> None:
    """They are used as given, never replaced."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    trainer = make_trainer(tmp_path, stage=stage, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    basic = trainer.deepspeed.basic_optimizer
    assert isinstance(basic, torch.optim.SGD)
    assert trainer.deepspeed.lr_scheduler is schedule
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert set(logged) == {0.025}
    trainer.close()


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
def test_a_nan_loss_stops_the_run_and_names_its_step(tmp_path: Path) -> None:
    """On all ranks alike: at a logging step, or before where the step had to be skipped."""
    from dstrain.core.errors import TrainingError

    for stage in (0, 2):  # DeepSpeed looks at gradients from stage 1 on
        trainer = make_trainer(
            tmp_path, stage=stage, logging_steps=3, callbacks=[_poison(at_step=2)]
        )
        with pytest.raises(TrainingError, match="loss was NaN or infinite at step 2"):
            trainer.train()
        assert not trainer.is_in_train
        trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_gradients_that_are_not_finite_do_not_skip_steps_for_ever(
    policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss stays finite, no loss scale is to be found: such a run used to end as if well."""
    from transformers import TrainerCallback

    from dstrain.core.errors import TrainingError

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                weight = kwargs["model"].lm_head.weight
                hook.append(weight.register_hook(lambda grad: grad * float("inf")))

    hook: list[Any] = []
    trainer = make_trainer(tmp_path, stage=2, nan_loss=policy, callbacks=[Spoil])
    if policy == "stop":
        with pytest.raises(TrainingError, match="step 2 skipped"):
            trainer.train()
        assert trainer.state.global_step == 1
    else:
        trainer.train()
        assert trainer.deepspeed.skipped_steps == 3
        assert ("step 2 skipped" in caplog.text) == trainer.ranks.is_main
    hook[0].remove()
    trainer.close()


@pytest.mark.ranks(2)
def test_a_nan_loss_is_left_out_of_the_log_when_told_to_go_on(tmp_path: Path) -> None:
    """nan_loss='continue' with the filter logs a finite mean; without it there is none."""
    for filtered in (True, False):
        trainer = make_trainer(
            tmp_path,
            logging_steps=4,
            nan_loss="continue",
            logging_nan_inf_filter=filtered,
            callbacks=[_poison(at_step=2)],
        )
        trainer.train()
        assert trainer.state.global_step == 4
        # A mean that is no number is left out of the record, which is JSON.
        assert len(losses(trainer)) == (1 if filtered else 0)
        trainer.close()


def _poison(*, at_step: int) -> Any:
    """Return a callback that makes one rank's weights, and so its loss, NaN before a step."""
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at_step - 1:
                with torch.no_grad():
                    kwargs["model"].lm_head.weight.mul_(float("nan"))

    return Poison


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_overflow_skips_the_step_and_is_counted_apart(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and schedule stay; the scale is halved; training then goes on.

    A first scale of 2**40 overflows for sure. The CPU here computes fp16 without saying so.
    """
    from deepspeed.accelerator import get_accelerator
    from transformers import TrainerCallback

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    seen: list[tuple[bool, float]] = []
    previous: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = whole_weights(trainer)
            moved = any(not torch.equal(now[n], previous[n]) for n in now) if previous else True
            previous.update(now)
            seen.append((moved, kwargs["optimizer"].param_groups[0]["lr"]))

    config = {"fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    trainer = make_trainer(
        tmp_path,
        stage=stage,
        deepspeed=config,
        max_steps=40,
        learning_rate=1e-3,
        callbacks=[Watch],
        max_grad_norm=0.0,
    )
    previous.update({n: p.half() for n, p in whole_weights(trainer).items()})
    metrics = trainer.train().metrics
    skipped = int(metrics["train_skipped_steps"])
    assert 10 < skipped < 35
    assert trainer.state.global_step == 40
    # Skipped steps come first here: nothing moved, and the rate stayed at its peak.
    assert [moved for moved, _ in seen[:skipped]] == [False] * skipped
    assert {rate for _, rate in seen[:skipped]} == {1e-3}
    assert seen[skipped][0]
    assert seen[-1][1] == pytest.approx(1e-3 * skipped / 40)
    scales = [e["loss_scale"] for e in trainer.state.log_history if "loss_scale" in e]
    assert scales[skipped - 1] == 2.0 ** (40 - skipped)
    curve = losses(trainer)
    assert curve[-1] < curve[0]
    trainer.close()


@pytest.mark.ranks(2)
def test_fp16_at_stage_zero_follows_stage_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's own stage 0 in fp16 divides by a scale that it never multiplied with."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    curves, norms = [], []
    for stage in (0, 1):
        # Windows of 3 steps make the scale grow in the middle of the run.
        config = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}}
        trainer = make_trainer(tmp_path, stage=stage, deepspeed=config, train=48, max_steps=12)
        trainer.train()
        curves.append(losses(trainer))
        norms.append([e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e])
        trainer.close()
    assert curves[0] == pytest.approx(curves[1], rel=5e-4)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@pytest.mark.ranks(2)
def test_a_schedule_of_deepspeeds_own_is_filled_and_used(tmp_path: Path) -> None:
    """Its "auto" values are known only when training starts; the Trainer is built before that."""
    config = {
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        }
    }
    trainer = make_trainer(tmp_path, train=40, warmup_steps=4, deepspeed=config)
    trainer.train()
    assert trainer.resolved.values["scheduler.params.total_num_steps"] == 10
    assert trainer.resolved.values["scheduler.params.warmup_num_steps"] == 4
    assert type(trainer.lr_scheduler).__name__ == "WarmupDecayLR"
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    # DeepSpeed's own schedule uses the minimum rate twice, and peaks one step late.
    assert rates[:6] == pytest.approx([0.0, 0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
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
def test_a_users_own_optimizer_trains_twice(stage: int, tmp_path: Path) -> None:
    """DeepSpeed puts flat tensors into its groups; the next engine needs the parameters again."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = make_trainer(tmp_path, stage=stage, model=model, optimizers=(optimizer, None))
    trainer.train()
    trainer.train()
    curve = losses(trainer)
    assert curve[4] < curve[0]
    assert not any(key.startswith("optimizer.") for key in trainer.resolved.values)
    trainer.close()


@pytest.mark.ranks(1)
def test_a_passed_object_and_a_section_of_the_config_are_a_conflict(tmp_path: Path) -> None:
    """Whichever lost would be lost silently."""
    from dstrain.core.errors import ConfigError

    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    with pytest.raises(ConfigError, match=r"(?s)'optimizer', and.*'scheduler', and"):
        make_trainer(tmp_path, model=model, deepspeed=config, optimizers=(optimizer, schedule))


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
def test_records_are_valid_json_whatever_the_loss(tmp_path: Path) -> None:
    """Python would write a bare NaN, which other readers refuse."""
    trainer = make_trainer(
        tmp_path, nan_loss="continue", callbacks=[_poison(at_step=1)], evaluation=2
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_state()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=refuse)
    trainer.close()


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
