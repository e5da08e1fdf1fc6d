"""Overrides and functions with other arguments than are passed: served, or refused at once."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import history, losses, make_trainer
from tests.models import pad_collate


def trainer_class() -> Any:
    from dstrain import Trainer

    return Trainer


@pytest.mark.ranks(2)
def test_older_overrides_train_and_evaluate_like_those_of_today(tmp_path: Path) -> None:
    """Without the arguments that releases of transformers have added since."""
    called: set[str] = set()

    class Older(trainer_class()):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any) -> Any:
            called.add("training_step")
            return super().training_step(model, inputs)

        def compute_loss(self, model: Any, inputs: Any) -> Any:
            called.add("compute_loss")
            return model(**inputs).loss

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool) -> Any:
            called.add("prediction_step")
            return super().prediction_step(model, inputs, prediction_loss_only)

        def evaluation_loop(
            self, dataloader: Any, description: str, prediction_loss_only: Any = None
        ) -> Any:
            called.add("evaluation_loop")
            return super().evaluation_loop(dataloader, description, prediction_loss_only)

        def log(self, logs: dict[str, float]) -> None:
            called.add("log")
            super().log(logs)

        def create_scheduler(self, num_training_steps: int) -> Any:
            called.add("create_scheduler")
            return super().create_scheduler(num_training_steps)

        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            called.add("create_optimizer_and_scheduler")
            super().create_optimizer_and_scheduler(num_training_steps)

        def save_model(self, output_dir: Any = None) -> None:
            called.add("save_model")
            super().save_model(output_dir)

        def evaluate(self, eval_dataset: Any = None) -> Any:
            called.add("evaluate")
            return super().evaluate(eval_dataset)

        def call_model_init(self) -> Any:
            return super().call_model_init()

    settings: dict[str, Any] = {"eval_strategy": "epoch", "train": 14, "max_grad_norm": 0.5}
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    older = make_trainer(tmp_path / "older", cls=Older, **settings)
    older.train()
    older.save_model(_internal_call=True)
    overrides = {name for name in vars(Older) if not name.startswith("__")} - {"call_model_init"}
    assert called == overrides
    assert losses(older) == losses(plain)
    assert history(older) == history(plain)
    assert (tmp_path / "older/model.safetensors").exists()


@pytest.mark.ranks(2)
def test_a_later_log_is_told_no_start(tmp_path: Path) -> None:
    """An argument that an override insists on has the default of the method it overrides."""

    class Own(trainer_class()):  # type: ignore[misc]
        def log(self, logs: Any, start_time: Any) -> None:
            assert start_time is None
            super().log(logs, start_time)

    trainer = make_trainer(tmp_path, cls=Own, train=8, evaluation=0)
    trainer.train()
    assert losses(trainer)


@pytest.mark.ranks(2)
def test_older_loss_functions_train_alike(tmp_path: Path) -> None:
    """compute_loss_func without num_items_in_batch."""
    from dstrain import Trainer, TrainingArguments
    from tests.models import RaggedTokens, tiny_llama

    def mean(outputs: Any, labels: Any) -> Any:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets)

    def told(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        assert num_items_in_batch is not None
        return mean(outputs, labels)

    seen = []
    for function in (mean, told):
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, max_steps=3,
        )  # fmt: skip
        trainer = Trainer(
            tiny_llama(), args, data_collator=pad_collate, train_dataset=RaggedTokens(16),
            eval_dataset=RaggedTokens(5), compute_loss_func=function,
        )  # fmt: skip
        trainer.train()
        seen.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert seen[0] == seen[1]


@pytest.mark.ranks(2)
def test_all_that_cannot_be_called_is_in_one_error(tmp_path: Path) -> None:
    """Of the class, of functions and of callbacks; before anything is built."""
    from transformers import TrainerCallback

    from dstrain import Trainer, TrainingArguments
    from dstrain.core.errors import ConfigError

    class Own(Trainer):
        def training_step(self, inputs: Any) -> Any: ...

        def compute_loss(self, model: Any, inputs: Any, *, mine: int) -> Any: ...

        def _save(self) -> None: ...

    class Short(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any) -> None: ...

        def on_log(self, args: Any, state: Any, control: Any, model: Any = None) -> None: ...

    with pytest.raises(ConfigError) as caught:
        Own(
            torch.nn.Linear(1, 1),
            TrainingArguments(str(tmp_path)),
            data_collator=lambda: None,
            compute_metrics=lambda predictions, labels: {},
            compute_loss_func=lambda outputs: None,
            preprocess_logits_for_metrics=lambda logits: logits,
            callbacks=[Short],
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"learning_rate": 1.0}),
        )
    named = [problem.what for problem in caught.value.problems]
    expected = [
        "Own overrides _save", r"Own.training_step\(inputs", r"Own.compute_loss\(model",
        r"compute_loss_func\(outputs\)", r"compute_metrics\(predictions, labels\)",
        r"preprocess_logits_for_metrics\(logits\)", r"data_collator\(\)", "Short.on_log",
        "Short.on_step_end", "optimizer_cls_and_kwargs: SGD cannot be called with learning_rate",
    ]  # fmt: skip
    assert len(named) == len(expected), named
    for what in expected:
        assert any(re.match(what, line) for line in named), what


@pytest.mark.ranks(2)
def test_predictions_need_the_outputs_of_the_loss(tmp_path: Path) -> None:
    """A compute_loss without them does for losses; metrics and predict say what is missing."""
    from dstrain.core.errors import ConfigError

    class Older(trainer_class()):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any) -> Any:
            return model(**inputs).loss

    trainer = make_trainer(tmp_path, cls=Older, train=8)
    plain = make_trainer(tmp_path, train=8)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    with pytest.raises(ConfigError, match="takes no return_outputs"):
        trainer.predict(trainer.eval_dataset)
    from dstrain import TrainingArguments
    from tests.models import tiny_llama

    with pytest.raises(ConfigError, match="takes no return_outputs"):
        Older(
            tiny_llama(),
            TrainingArguments(str(tmp_path)),
            eval_dataset=trainer.eval_dataset,
            compute_metrics=lambda prediction: {},
        )


@pytest.mark.ranks(1)
def test_a_method_put_on_the_trainer_is_looked_at_when_training_starts(tmp_path: Path) -> None:
    """Also one that replaces a method of the instance alone; and a callback that is added."""
    from transformers import TrainerCallback

    from dstrain.core.errors import ConfigError

    class Short(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any) -> None: ...

    trainer = make_trainer(tmp_path, train=4, evaluation=0)
    seen: list[Any] = []

    def compute_loss(model: Any, inputs: Any) -> Any:
        seen.append(inputs)
        return model(**inputs).loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(seen) == 2
    trainer.compute_loss = lambda model: None
    with pytest.raises(ConfigError, match="cannot be called"):
        trainer.train()
    with pytest.raises(ConfigError, match=r"Short\.on_step_end"):
        trainer.add_callback(Short())


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, inputs: (model(**inputs).loss, 1), "returned a tuple"),
        (lambda model, inputs: model(**inputs), "returned a CausalLMOutputWithPast"),
        (lambda model, inputs: None, "returned nothing"),
        (lambda model, inputs: model(**inputs).loss.item(), "returned a float"),
        (lambda model, inputs: model(**inputs).loss.detach(), "a loss without a gradient"),
    ],
    ids=["tuple", "outputs", "none", "float", "detached"],
)
def test_what_is_no_loss_is_named_in_the_first_step(
    loss: Any, message: str, tmp_path: Path
) -> None:
    """On every rank, with the override that returned it and what is expected of it."""
    from dstrain.core.errors import TrainingError

    class Wrong(trainer_class()):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs=False, **kwargs: Any) -> Any:
            return loss(model, inputs)

    trainer = make_trainer(tmp_path, cls=Wrong, max_steps=1)
    with pytest.raises(TrainingError, match=rf"Wrong\.compute_loss returned.*{message[9:]}"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(1)
def test_a_function_that_cannot_be_called_is_refused_at_once(tmp_path: Path) -> None:
    from dstrain.core.errors import ConfigError

    with pytest.raises(ConfigError, match="compute_loss_func='mean'"):
        make_trainer(tmp_path, cls=partial(trainer_class(), compute_loss_func="mean"))


@pytest.mark.ranks(1)
def test_data_that_can_be_read_only_once_is_named_in_the_second_epoch(tmp_path: Path) -> None:
    from dstrain.core.errors import DataError

    rows = list(make_trainer(tmp_path).train_dataset)

    class Once(torch.utils.data.IterableDataset[Any]):
        left = iter(rows)

        def __iter__(self) -> Any:
            return self.left

    trainer = make_trainer(tmp_path, data=Once(), max_steps=100)
    with pytest.raises(DataError, match="no sample in epoch 2, though it did before"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(1)
@pytest.mark.parametrize("saves", [True, False])
def test_a_save_of_ones_own_is_said_to_be_none_of_checkpoints(
    saves: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers' Trainer calls it for each checkpoint; only where there are any, it matters."""
    from dstrain import Trainer

    class Own(Trainer):
        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            """Save in another way."""

    for cls in (Own, Trainer):
        caplog.clear()
        settings: dict[str, Any] = {"save_strategy": "steps" if saves else "no", "max_steps": 1}
        trainer = make_trainer(tmp_path / cls.__name__, cls=cls, save_steps=1, **settings)
        trainer.train()
        trainer.close()
        assert ("Own overrides save_model" in caplog.text) == (saves and cls is Own)
