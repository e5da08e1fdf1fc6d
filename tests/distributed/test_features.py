"""Arguments that change how a model computes: what they change, at every stage, and what not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, losses, make_trainer
from tests.models import RaggedTokens, pad_collate, tiny_llama


def _run(folder: Path, **arguments: Any) -> Any:
    """Train shortly and close the trainer, whose model is then an ordinary one."""
    trainer = make_trainer(folder, **{"max_steps": 3, "evaluation": 0, **arguments})
    trainer.train()
    trainer.close(whole=True)
    return trainer


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_activations_changes_no_number(stage: int, tmp_path: Path) -> None:
    """In both ways of torch; layers run twice, without a cache of keys, and nothing stays."""
    plain = losses(_run(tmp_path, stage=stage))
    runs: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        runs.append(kwargs.get("past_key_values", kwargs.get("cache")))

    for kwargs in (None, {"use_reentrant": True}):
        model = tiny_llama()
        runs.clear()
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        trainer = _run(
            tmp_path,
            stage=stage,
            model=model,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
        )
        assert losses(trainer) == pytest.approx(plain, rel=1e-6)
        assert runs == [None] * 12, "three steps, two layers, each run twice"
        assert not model.is_activation_checkpointing
        assert model.config.use_cache
        assert not model._forward_pre_hooks


@pytest.mark.ranks(2)
def test_a_compiled_model_trains_alike_and_is_saved_under_its_names(tmp_path: Path) -> None:
    """At stage 3, where hooks gather parameters inside of what is compiled."""
    plain = losses(_run(tmp_path, stage=3, max_steps=2, model=tiny_llama(num_hidden_layers=1)))
    model = tiny_llama(num_hidden_layers=1)
    names = list(model.state_dict())
    trainer = make_trainer(
        tmp_path, stage=3, max_steps=2, model=model, torch_compile_backend="aot_eager"
    )
    trainer.train()
    assert model._compiled_call_impl is not None
    assert losses(trainer) == pytest.approx(plain, rel=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.close(whole=True)
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == names
    from transformers import AutoModelForCausalLM

    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_noise_on_embeddings_is_for_training_alone(stage: int, tmp_path: Path) -> None:
    """The loss of training changes, that of an evaluation inside of it does not; no hook stays."""
    plain = make_trainer(tmp_path, stage=stage, max_steps=1, learning_rate=0.0, eval_on_start=True)
    plain.train()
    model = tiny_llama()
    noisy = make_trainer(
        tmp_path,
        stage=stage,
        model=model,
        max_steps=1,
        learning_rate=0.0,
        eval_on_start=True,
        eval_strategy="steps",
        neftune_noise_alpha=5.0,
    )
    noisy.train()
    evaluated = [e["eval_loss"] for e in noisy.state.log_history if "eval_loss" in e]
    assert evaluated == [pytest.approx(plain.state.log_history[0]["eval_loss"], rel=1e-6)] * 2
    assert abs(losses(noisy)[0] - losses(plain)[0]) > 1e-4
    noisy.close()
    plain.close()
    assert not model.get_input_embeddings()._forward_hooks


def _smoothed(model: Any, examples: Any, share: float) -> float:
    """Compute the loss of all examples by transformers' own LabelSmoother."""
    from transformers.trainer_pt_utils import LabelSmoother

    batch = pad_collate(examples)
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = model(**batch)
        return float(LabelSmoother(epsilon=share)(outputs, labels, shift_labels=True))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_smoothed_labels_as_transformers_smooths_them(stage: int, tmp_path: Path) -> None:
    """Training and evaluation, over the same targets, whatever the micro-batch."""
    data, expected = RaggedTokens(8), {}
    model = tiny_llama().eval()
    expected["loss"] = _smoothed(model, data, 0.2)
    expected["eval_loss"] = _smoothed(model, RaggedTokens(7, seed=99), 0.2)
    curves = []
    for micro, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            stage=stage,
            data=data,
            max_steps=3,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=0.2,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        trainer.train()
        trainer.close()
        curves.append(losses(trainer))
    assert curves[0][0] == pytest.approx(expected["loss"], rel=1e-5)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_an_overflow_in_a_layer_is_found(stage: int, tmp_path: Path) -> None:
    """transformers' DebugUnderflowOverflow names the layer; its hooks go with the training."""
    model = tiny_llama()
    trainer = make_trainer(
        tmp_path, stage=stage, model=model, max_steps=2, debug="underflow_overflow"
    )
    trainer.train()
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert not [h for h in hooks if "Underflow" in repr(getattr(h, "__self__", ""))]
    trainer.close()
    bad = tiny_llama()
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    trainer = make_trainer(
        tmp_path, stage=stage, model=bad, max_steps=2, debug="underflow_overflow"
    )
    with pytest.raises(ValueError, match="inf/nan detected"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(2)
def test_tokens_memory_and_determinism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted and measured, and the modes that a process keeps."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC",
                 "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "")
    emptied: list[int] = []
    monkeypatch.setattr("dstrain.training.loop.empty_cache", lambda: emptied.append(1))
    data = RaggedTokens(12)
    text = sum(len(example["input_ids"]) for example in data.examples)
    try:
        trainer = make_trainer(
            tmp_path,
            data=data,
            logging_steps=2,
            include_num_input_tokens_seen="non_padding",
            skip_memory_metrics=False,
            torch_empty_cache_steps=2,
            full_determinism=True,
        )
        assert torch.are_deterministic_algorithms_enabled()
        output = trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert len(emptied) == 1, "of three steps the second"
    counts = [e["num_input_tokens_seen"] for e in trainer.state.log_history]
    assert counts == sorted(counts)
    assert counts[-1] == trainer.state.num_input_tokens_seen == text
    stages = ("before_init_mem_cpu", "init_mem_cpu_alloc_delta", "init_mem_cpu_peaked_delta")
    assert {*stages, "train_mem_cpu_alloc_delta", "train_mem_cpu_peaked_delta"} <= set(
        output.metrics
    )
    assert all(isinstance(v, int) for k, v in output.metrics.items() if "_mem_" in k)
    figures = trainer.evaluate()
    assert {"eval_mem_cpu_alloc_delta", "eval_mem_cpu_peaked_delta"} <= set(figures)
    assert "init_mem_cpu_alloc_delta" not in figures, "reported once"
    trainer.close()
    padded = _run(tmp_path, data=data, max_steps=-1, include_num_input_tokens_seen=True)
    assert padded.state.num_input_tokens_seen > text


@pytest.mark.ranks(2)
def test_batch_sizes_of_all_ranks_together(tmp_path: Path) -> None:
    """``split_batches``: the batch of 4 is 2 for each of two ranks."""
    plain = _run(tmp_path, per_device_train_batch_size=2)
    split = _run(
        tmp_path, per_device_train_batch_size=4, accelerator_config={"split_batches": True}
    )
    assert losses(split) == losses(plain)
    from dstrain.core.errors import ConfigError

    with pytest.raises(ConfigError, match="does not split evenly"):
        make_trainer(
            tmp_path, per_device_train_batch_size=3, accelerator_config={"split_batches": True}
        )


class _Unrepeatable(torch.utils.data.IterableDataset[Any]):
    """A stream that gives each reader other samples, and fails when it is told to."""

    def __init__(self, rank: int, *, fails: bool = False) -> None:
        self.rank, self.fails, self.read = rank, fails, 0

    def __iter__(self) -> Any:
        for example in RaggedTokens(10, seed=self.rank).examples:
            self.read += 1
            if self.fails and self.read == 6:
                raise OSError("the line is cut")
            yield example


@pytest.mark.ranks(2)
def test_the_main_rank_reads_a_stream_for_all(rank: int, tmp_path: Path) -> None:
    """The curve is that of the main rank's stream; the other's is never opened; errors arrive."""
    from dstrain.core.errors import DataError

    arguments: dict[str, Any] = {"max_steps": 5, "accelerator_config": {"dispatch_batches": True}}
    stream = _Unrepeatable(rank)
    sent = _run(tmp_path, data=stream, **arguments)
    assert (stream.read > 0) == (rank == 0)
    read = _run(tmp_path, data=_Unrepeatable(0), max_steps=5)
    assert losses(sent) == losses(read)
    broken = make_trainer(tmp_path, data=_Unrepeatable(rank, fails=True), evaluation=0, **arguments)
    with pytest.raises(DataError, match="the line is cut"):
        broken.train()
    broken.close()
    with pytest.raises(DataError, match="a dataset with a length"):
        _run(tmp_path, **arguments)


@pytest.mark.ranks(2)
def test_similar_lengths_share_a_batch(tmp_path: Path) -> None:
    """Fewer tokens of padding in the same samples, and a run that goes on in the middle."""
    data = RaggedTokens(32, min_length=4, max_length=48)
    arguments: dict[str, Any] = {
        "data": data, "max_steps": 8, "include_num_input_tokens_seen": True, "save_steps": 3,
        "save_strategy": "steps",
    }  # fmt: skip
    mixed = _run(tmp_path / "mixed", **arguments)
    grouped = _run(tmp_path / "grouped", group_by_length=True, **arguments)
    seen = grouped.state.num_input_tokens_seen
    assert seen < 0.9 * mixed.state.num_input_tokens_seen
    resumed = make_trainer(tmp_path / "grouped", group_by_length=True, evaluation=0, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "grouped" / "checkpoint-3"))
    assert losses(resumed) == losses(grouped)
    assert resumed.state.num_input_tokens_seen == seen
    resumed.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("stage", "kind"), [(0, "greedy"), (2, "reduce_lr_on_plateau"),
                                             (3, "reduce_lr_on_plateau")])  # fmt: skip
def test_a_schedule_follows_the_metric_of_evaluations(
    stage: int, kind: str, tmp_path: Path
) -> None:
    """The rate falls as the metric does not improve, and a resumed run goes on the same way."""
    options = {"factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    if kind == "greedy":
        options = {"factor": 0.5, "patience": 0, "min_lr": 1e-6}
    arguments: dict[str, Any] = {
        "stage": stage, "max_steps": 6, "evaluation": 4, "learning_rate": 0.5,
        "lr_scheduler_type": kind, "lr_scheduler_kwargs": options,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    whole = make_trainer(tmp_path, **arguments)
    whole.train()
    rates = [e["learning_rate"] for e in whole.state.log_history if "learning_rate" in e]
    assert rates[0] == 0.5
    assert rates[-1] < 0.3
    assert whole.lr_scheduler.state_dict()["best"] < 1e3, "a loss, and not the batch size"
    whole.close()
    resumed = make_trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [e["learning_rate"] for e in resumed.state.log_history if "learning_rate" in e] == rates
    assert losses(resumed) == losses(whole)
    resumed.close()
