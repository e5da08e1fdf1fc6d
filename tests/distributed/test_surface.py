"""What a script calls on a ``Trainer``, and what a subclass overrides, beyond the loop itself."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import history, losses, make_trainer, whole_weights
from tests.models import RaggedTokens, pad_collate, tiny_llama, tiny_llama_config


def _numel(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make_own(folder: Path, *, given: dict[str, Any], **arguments: Any) -> Any:
    """Make a trainer with constructor arguments that ``make_trainer`` does not know."""
    from dstrain import Trainer

    class Given(Trainer):
        def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
            super().__init__(None if "model_init" in given else model, args, **kwargs, **given)

    return make_trainer(folder, cls=Given, **arguments)


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_counts_are_right_at_every_stage(stage: int, tmp_path: Path) -> None:
    """transformers counts no parameter, and so no operation, once ZeRO-3 has partitioned them."""
    from transformers import TrainerCallback

    seen: dict[str, int] = {}

    class Tracker(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            seen["all"] = kw["model"].num_parameters()
            seen["outside embeddings"] = kw["model"].num_parameters(exclude_embeddings=True)

    whole = tiny_llama()
    parameters = _numel(whole)
    embedding = whole.model.embed_tokens.weight.numel()
    head = whole.lm_head.weight.numel()
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    data = RaggedTokens(16, min_length=8, max_length=8)
    trainer = make_trainer(
        tmp_path, stage=stage, model=model, data=data, callbacks=[Tracker], logging_steps=3
    )
    assert trainer.get_num_trainable_parameters() == parameters - head
    output = trainer.train()
    assert trainer.get_num_trainable_parameters() == parameters - head
    assert seen == {"all": parameters, "outside embeddings": parameters - embedding}
    inputs = pad_collate([data[0], data[1]])
    per_micro_batch = 6 * 16 * (parameters - embedding)
    assert trainer.floating_point_ops(inputs) == per_micro_batch
    # 16 samples of 8 tokens, once: whatever the number of ranks, micro-batches and logs.
    assert output.metrics["total_flos"] == trainer.state.total_flos == 8 * per_micro_batch
    assert trainer.metrics_format(output.metrics)["total_flos"].endswith("GF")
    loader = trainer.get_train_dataloader()
    assert trainer.num_examples(loader) == 16
    assert trainer.num_examples([inputs] * 3) == 3 * 2
    assert trainer.num_tokens(loader) == 16 * 8 / 2, "of this rank"
    assert trainer.num_tokens(loader, max_steps=5) == 5 * 16
    trainer.train()
    assert trainer.state.total_flos == 8 * per_micro_batch, "of one run"
    trainer.close()


@pytest.mark.ranks(2)
def test_operations_go_on_counting_after_a_resume(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "train": 16, "logging_steps": 3}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    whole = trainer.state.total_flos
    assert whole > 0
    trainer.close()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(model_path=str(tmp_path / "checkpoint-2"))  # the old name
    assert resumed.state.total_flos == whole
    with pytest.raises(TypeError, match="unexpected keyword arguments: modelpath"):
        resumed.train(modelpath="x")
    resumed.close()


# --- model_init ----------------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_each_training_has_a_new_model_from_model_init(stage: int, tmp_path: Path) -> None:
    """The same seed gives the same weights again, another seed others; in any order of calls."""
    from transformers import AutoModelForCausalLM

    from dstrain.engine import is_partitioned

    trials: list[Any] = []
    partitioned: list[bool] = []

    def model_init(trial: Any) -> Any:
        trials.append(trial)
        model = AutoModelForCausalLM.from_config(tiny_llama_config(num_hidden_layers=1))
        partitioned.append(all(is_partitioned(p) for p in model.parameters()))
        return model

    trainer = make_own(
        tmp_path, given={"model_init": model_init}, stage=stage, train=8, evaluation=4
    )
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    first, curve = whole_weights(trainer), losses(trainer)
    assert trainer.evaluate()["eval_loss"] != untrained
    trainer.train(trial={"a": 1})
    second = whole_weights(trainer)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert losses(trainer) == curve * 2
    trainer.args.seed = 7
    trainer.train()
    assert not torch.equal(
        first["model.embed_tokens.weight"], whole_weights(trainer)["model.embed_tokens.weight"]
    )
    assert trials == [None, None, {"a": 1}, None]
    assert set(partitioned) == {stage == 3}
    trainer.close()


@pytest.mark.ranks(1)
def test_where_a_model_comes_from_is_clear_or_refused(tmp_path: Path) -> None:
    from dstrain import Trainer, TrainingArguments
    from dstrain.core.errors import ConfigError, ModelError

    args = TrainingArguments(str(tmp_path), report_to="none")
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="a model, or model_init, is needed"):
        Trainer(args=args)
    with pytest.raises(ConfigError, match="model and model_init were both passed"):
        Trainer(model, args, model_init=lambda: model)
    with pytest.raises(ConfigError, match="model_init and optimizers were both passed"):
        Trainer(args=args, model_init=lambda: model, optimizers=(optimizer, None))
    with pytest.raises(ConfigError, match="model_init takes 2 arguments"):
        Trainer(args=args, model_init=lambda trial, size: model)
    with pytest.raises(ModelError, match="model_init returned None"):
        Trainer(args=args, model_init=lambda: None)
    spread = torch.nn.Linear(1, 1)
    spread.hf_device_map = {"a": 0, "b": "cpu"}
    with pytest.raises(ModelError, match="the layers of the model lie on 0, cpu"):
        Trainer(spread, args)
    with pytest.raises(ConfigError, match="tokenizer and processing_class were both passed"):
        Trainer(model, args, processing_class=object(), tokenizer=object())
    with pytest.warns(FutureWarning, match="pass it as processing_class"):
        trainer = Trainer(model, args, tokenizer="a tokenizer")
    assert trainer.processing_class == trainer.tokenizer == "a tokenizer"
    assert trainer.model is trainer.model_wrapped is model
    attributes = (trainer.is_model_parallel, trainer.place_model_on_device, trainer.is_in_train)
    assert attributes == (False, False, False)
    trainer.close()


# --- hooks ---------------------------------------------------------------------------------------


def _cross_entropy(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """Compute a causal language model's summed loss, divided as the trainer says."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    summed = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return summed / num_items_in_batch


@pytest.mark.ranks(2)
def test_a_loss_function_of_the_users_trains_like_the_models_own(tmp_path: Path) -> None:
    """In training and evaluation, ragged and with accumulation; the model sees no labels."""
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    plain = make_trainer(tmp_path, **settings)
    plain.train()
    plain.close()
    calls: list[bool] = []

    def function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(outputs.get("loss") is None)
        return _cross_entropy(outputs, labels, num_items_in_batch)

    own = make_own(tmp_path, given={"compute_loss_func": function}, **settings)
    own.train()
    own.close()
    assert calls
    assert all(calls)
    for ours, theirs in zip(history(own), history(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.ranks(2)
def test_overrides_of_a_subclass_are_called(tmp_path: Path) -> None:
    """Each documented hook of a step, and the arguments of train that reach an evaluation."""
    from dstrain import Trainer

    called: set[str] = set()

    class Own(Trainer):
        def floating_point_ops(self, inputs: Any) -> int:
            return 1000

        def autocast_smart_context_manager(self, cache_enabled: Any = True) -> Any:
            called.add("autocast")
            return super().autocast_smart_context_manager(cache_enabled)

        def compute_loss_context_manager(self) -> Any:
            stack = contextlib.ExitStack()
            stack.enter_context(super().compute_loss_context_manager())
            stack.callback(called.add, "context")
            return stack

        def log(self, logs: Any, start_time: float | None = None) -> None:
            super().log({**logs, "own": 1.0}, start_time)

        def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, **kw: Any) -> Any:
            called.add(f"evaluate without {ignore_keys}")
            return super().evaluate(eval_dataset, ignore_keys, **kw)

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            called.add("decay")
            return super().get_decay_parameter_names(model)

    trainer = make_trainer(tmp_path, cls=Own, eval_strategy="epoch", weight_decay=0.1)
    trainer.train(ignore_keys_for_eval=["past_key_values"])
    expected = {"autocast", "context", "decay", "evaluate without ['past_key_values']"}
    assert called == expected
    assert trainer.state.total_flos == 8 * 1000, "eight micro-batches on two ranks"
    assert all(entry["own"] == 1.0 for entry in trainer.state.log_history)
    trainer.log({}, start_time=0.0)
    assert trainer.state.log_history[-1]["train_runtime"] > 0
    trainer.args.learning_rate = 0.25
    trainer.propagate_args_to_deepspeed()
    assert trainer.resolved.learning_rate == 0.25
    trainer.args.set_dataloader(train_batch_size=1)  # after the constructor, and it holds
    trainer.train()
    assert trainer.deepspeed.train_micro_batch_size_per_gpu() == 1
    assert trainer.state.global_step == 8
    trainer.save_metrics("eval", {"eval_loss": 1.5})
    trainer.save_metrics("train", {"train_loss": 2.5})
    torch.distributed.barrier()
    combined = json.loads((tmp_path / "all_results.json").read_text())
    assert combined == {"eval_loss": 1.5, "train_loss": 2.5}
    trainer.close()


@pytest.mark.ranks(1)
def test_callbacks_come_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By class and by instance; the default ones are there, and a run is announced."""
    from transformers import DefaultFlowCallback, PrinterCallback, TrainerCallback

    class Own(TrainerCallback):
        pass

    trainer = make_trainer(tmp_path, train=4, callbacks=[Own])

    def kinds() -> list[type]:
        return [type(c) for c in trainer.callback_handler.callbacks]

    assert kinds() == [DefaultFlowCallback, Own, PrinterCallback]
    own = trainer.pop_callback(Own)
    assert isinstance(own, Own)
    assert trainer.pop_callback(Own) is None
    trainer.remove_callback(Own)  # as in transformers: no error by class
    with pytest.raises(ValueError, match="not in list"):
        trainer.remove_callback(own)
    trainer.add_callback(own)
    trainer.add_callback(Own)
    assert kinds()[-2:] == [Own, Own]
    trainer.remove_callback(own)
    trainer.remove_callback(Own)
    assert kinds() == [DefaultFlowCallback, PrinterCallback]
    with caplog.at_level("INFO", logger="dstrain"):
        trainer.train()
    parameters = f"{_numel(tiny_llama()):,}"
    expected = (
        "Running training: 4 examples, 2 steps of 2 (2 a rank, accumulated 1 times, 1 ranks), "
        f"{parameters} trainable parameters"
    )
    assert expected in caplog.text
    trainer.close()


class _Returns(torch.nn.Module):
    """A linear model that returns its loss in one of the ways that are documented."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.linear(x).squeeze(-1)
        loss = torch.nn.functional.mse_loss(logits, labels)
        if self.form == "loss":
            return loss
        if self.form == "tuple":
            return loss, logits
        if self.form == "dict":
            return {"loss": loss, "logits": logits}
        if self.form == "output":
            return SequenceClassifierOutput(loss=loss, logits=logits)
        return {"logits": logits}


@pytest.mark.ranks(2)
def test_any_module_that_returns_its_loss_in_a_documented_way_trains(tmp_path: Path) -> None:
    from dstrain import Trainer, TrainingArguments
    from dstrain.core.errors import ModelError

    data = [{"x": torch.tensor([i / 8, 1.0]), "labels": torch.tensor(float(i))} for i in range(8)]
    curves = []
    for form in ("loss", "tuple", "dict", "output", "nothing"):
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path), report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True
        )
        trainer = Trainer(_Returns(form), args, train_dataset=data, eval_dataset=data)
        if form == "nothing":
            with pytest.raises(ModelError, match="returned no loss, only \\['logits'\\]"):
                trainer.train()
        else:
            trainer.train()
            curves.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
        assert trainer.floating_point_ops(data[0]) == 0, "of a module that says nothing of it"
        trainer.close()
    assert curves == [curves[0]] * 4
