"""Prediction: every sample once and in order, on rank 0 alone; metrics once, known to all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed.predictions import (
    EVERYTHING_WIDE,
    Spy,
    Stream,
    check_predictions,
    expected_predictions,
)
from tests.distributed.runs import make_trainer
from tests.models import RaggedTokens, pad_collate


@pytest.mark.parametrize(
    "world_size_wanted", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3)]
)
def test_each_sample_once_in_order_on_rank_zero(
    world_size_wanted: int, tmp_path: Path, rank: int
) -> None:
    """Ragged batches and ends, fewer samples than ranks, in memory and in files, by streams too."""
    metrics = {}
    for num_samples in (1, 2, 11):
        for batch, memory, stream, every in (
            (1, 64, False, None),
            (3, 0, True, 1),
            (3, 0, False, 2),
            (8, 64, True, 3),
        ):
            data: Any = RaggedTokens(num_samples, seed=99)
            trainer = make_trainer(
                tmp_path,
                evaluation=Stream(list(data)) if stream else data,
                per_device_eval_batch_size=batch,
                eval_memory_mb=memory,
                eval_accumulation_steps=every,
                include_for_metrics=["inputs", "loss"],
            )
            trainer.compute_metrics = spy = Spy()
            found = trainer.evaluate()
            right = metrics.setdefault(num_samples, found["eval_right"])
            assert found["eval_right"] == pytest.approx(right, abs=1e-12)
            assert isinstance(found["eval_right"], float)
            output = trainer.predict(trainer.eval_dataset, metric_key_prefix="held_out")
            assert output.metrics["held_out_right"] == found["eval_right"]
            assert output.metrics["held_out_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
            if rank == 0:
                assert len(spy.calls) == 2
                seen = spy.calls[0]
                check_predictions(seen.predictions, seen.label_ids, num_samples)
                check_predictions(output.predictions, output.label_ids, num_samples)
                assert isinstance(output.predictions, np.memmap) == (memory == 0)
                assert seen.inputs.shape[0] == seen.losses.shape[0] == num_samples
                first = data[0]["input_ids"]
                assert seen.inputs[0, : len(first)].tolist() == first
            else:
                assert not spy.calls
                assert output.predictions.shape[0] == output.label_ids.shape[0] == 0
                assert output.predictions.shape[2] == 259
    assert not [p for p in tmp_path.iterdir() if "prediction" in p.name]


@pytest.mark.ranks(2)
def test_no_concat_gives_a_list_of_global_batches(tmp_path: Path, rank: int) -> None:
    """eval_do_concat_batches=False; in files, with batches that are padded across ranks."""
    for memory in (64, 0):
        trainer = make_trainer(
            tmp_path,
            per_device_eval_batch_size=2,
            eval_do_concat_batches=False,
            eval_memory_mb=memory,
        )
        trainer.compute_metrics = lambda p: {"batches": len(p.predictions)}
        output = trainer.predict(trainer.eval_dataset)
        assert output.metrics["test_batches"] == 2
        assert isinstance(output.predictions, list)
        if rank == 0:
            logits, labels = expected_predictions(7)
            assert [len(part) for part in output.predictions] == [4, 3]
            assert [part.shape[1] for part in output.label_ids] == [
                max(map(len, logits[:4])),
                max(map(len, logits[4:])),
            ]
            np.testing.assert_allclose(
                output.predictions[1][2, : len(logits[6])], logits[6], rtol=1e-4, atol=1e-5
            )
            assert output.label_ids[0][1, : len(labels[1])].tolist() == labels[1].tolist()
        else:
            assert output.predictions == []


@pytest.mark.ranks(2)
def test_no_concat_without_labels_or_with_some(tmp_path: Path, rank: int) -> None:
    """None in the place of labels that no batch has; an error where some batches have them."""
    from dstrain.core.errors import DataError

    trainer = make_trainer(
        tmp_path, per_device_eval_batch_size=2, eval_do_concat_batches=False,
        include_for_metrics=["inputs", "loss"],
    )  # fmt: skip
    trainer.compute_metrics = spy = Spy()
    given = {"labels": 0}  # batches of this rank that come with labels

    def collate(samples: Any) -> Any:
        batch = pad_collate(samples)
        given["labels"] -= 1
        return batch if given["labels"] >= 0 else {**batch, "labels": None}

    trainer.data_collator = collate
    logits, _ = expected_predictions(7)
    for every in (1, 2):
        trainer.args.eval_accumulation_steps = every
        output = trainer.predict(trainer.eval_dataset)
        assert output.label_ids is None
        assert not [name for name in output.metrics if name.endswith(("loss", "right"))]
        assert [len(part) for part in output.predictions] == [4, 3][: 2 * (rank == 0)]
        for index, row in enumerate(logits if rank == 0 else ()):
            found = output.predictions[index // 4][index % 4, : len(row)]
            np.testing.assert_allclose(found, row, rtol=1e-4, atol=1e-5)
        for concat in (False, True):
            trainer.args.eval_do_concat_batches = concat
            given["labels"] = 1 + rank  # the other rank's second batch has none
            with pytest.raises(DataError, match="has labels, and the other has none"):
                trainer.predict(trainer.eval_dataset)
            given["labels"] = rank
            with pytest.raises(DataError, match="rank 1 and rank 0 has labels"):
                trainer.evaluate()
            given["labels"] = 0
        trainer.args.eval_do_concat_batches = False
    assert not spy.calls


class Nested(nn.Module):
    """Returns what it is told to: nested outputs, only logits, or only a loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.kind = kind

    def forward(self, x: torch.Tensor, labels_1: Any = None, labels_2: Any = None) -> Any:
        out = self.linear(x)
        loss = out.mean() if labels_1 is None else ((out[:, 0] - labels_1) ** 2).mean()
        if self.kind == "dict":
            return {"loss": loss, "out": out, "extra": {"a": (out[:, 0], out[:, :2])}, "none": None}
        if self.kind == "logits":
            return (out,)
        return loss if self.kind == "loss" else (loss, out, [out[:1].mean(), x])


@pytest.mark.ranks(2)
def test_any_model_any_nesting_any_labels(tmp_path: Path, rank: int) -> None:
    """Tuples, dicts, numbers, no labels, no logits, no loss; ignore_keys; a plain module."""
    from dstrain import Trainer, TrainingArguments

    x = torch.arange(10.0).reshape(5, 2)
    data = [{"x": x[i], "labels_1": x[i, 0], "labels_2": x[i, 1]} for i in range(5)]
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to="none", disable_tqdm=True
    )

    def predict(kind: str, dataset: Any = data, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        trainer = Trainer(Nested(kind), args)
        return trainer.predict(dataset, **kwargs), trainer.model.linear(x).detach().numpy()

    output, out = predict("dict")
    assert len(output.predictions) == 2
    assert len(output.label_ids) == 2
    assert np.isfinite(output.metrics["test_loss"])
    if rank == 0:
        np.testing.assert_allclose(output.predictions[0], out, rtol=1e-6)
        np.testing.assert_allclose(output.predictions[1]["a"][0], out[:, 0], rtol=1e-6)
        assert output.label_ids[1].tolist() == x[:, 1].tolist()
    output, out = predict("dict", ignore_keys=["extra"])
    assert isinstance(output.predictions, np.ndarray)
    output, out = predict("tuple")
    if rank == 0:
        # Of a number there is one for each batch of a rank, and none for a stand-in.
        assert [len(p) for p in output.predictions[1]] == [3, 5]
    output, out = predict("logits", [{"x": row} for row in x])
    assert output.label_ids is None
    assert "test_loss" not in output.metrics
    if rank == 0:
        np.testing.assert_allclose(output.predictions, out, rtol=1e-6)
    output, out = predict("loss", [{"x": row} for row in x])
    assert output.predictions is None
    assert output.metrics["test_loss"] == pytest.approx(float(out.mean()), rel=1e-5)


@pytest.mark.ranks(2)
def test_overrides_of_every_step_are_honoured(tmp_path: Path) -> None:
    """prediction_step, prediction_loop, evaluation_loop, loaders, preprocessing, by name."""
    from dstrain import Trainer

    called: list[str] = []

    class Mine(Trainer):
        """Writes down what is called."""

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            called.append("step")
            loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
            return loss * 2, logits, labels

        def prediction_loop(self, *args: Any, **kwargs: Any) -> Any:
            called.append("prediction_loop")
            return super().prediction_loop(*args, **kwargs)

        def evaluation_loop(self, dataloader: Any, description: str, *args: Any) -> Any:
            called.append(description)
            return super().evaluation_loop(dataloader, description, *args)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            called.append(f"eval {eval_dataset}")
            return super().get_eval_dataloader(eval_dataset)

        def get_test_dataloader(self, test_dataset: Any) -> Any:
            called.append("test loader")
            return super().get_test_dataloader(test_dataset)

    sets = {"a": RaggedTokens(2, seed=99), "b": RaggedTokens(3, seed=1)}
    trainer = make_trainer(tmp_path, evaluation=sets, cls=Mine)
    events: list[str] = []
    for name in ("on_prediction_step", "on_evaluate", "on_predict", "on_log"):
        original = getattr(trainer.events.handler, name)

        def record(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            events.append(name)
            return original(*args, **kwargs)

        setattr(trainer.events.handler, name, record)
    plain = make_trainer(tmp_path, evaluation=sets)
    metrics, expected = trainer.evaluate(), plain.evaluate()
    assert called == [
        *("eval a", "prediction_loop", "Evaluation", "step"),
        *("eval b", "prediction_loop", "Evaluation", "step"),
    ]
    assert events == ["on_prediction_step", "on_log", "on_evaluate"] * 2
    assert metrics["eval_a_loss"] == pytest.approx(2 * expected["eval_a_loss"])
    assert metrics["eval_b_loss"] == pytest.approx(2 * expected["eval_b_loss"])
    assert "eval_loss" not in metrics
    called.clear(), events.clear()
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    output = trainer.predict(sets["b"])
    assert called == ["test loader", "prediction_loop", "Prediction", "step"]
    assert events == ["on_prediction_step", "on_predict"]
    assert output.predictions.ndim == 2
    assert output.predictions.dtype == np.int64
    assert trainer.evaluate("a")["eval_loss"] == pytest.approx(metrics["eval_a_loss"])
    with pytest.raises(ValueError, match=r"'c'(.|\n)*\['a', 'b'\]"):
        trainer.evaluate("c")
    trainer.args.prediction_loss_only = True
    output = trainer.predict(sets["b"])
    assert output.predictions is None
    assert output.metrics["test_loss"] == pytest.approx(metrics["eval_b_loss"])


@pytest.mark.ranks(3)
def test_predictions_at_stage_three_with_unequal_counts(tmp_path: Path, rank: int) -> None:
    """Nothing stays gathered, so every forward pass is a collective; before and after training."""
    for num_samples in (1, 4):
        trainer = make_trainer(
            tmp_path,
            stage=3,
            deepspeed=EVERYTHING_WIDE,
            evaluation=num_samples,
            per_device_eval_batch_size=1,
            train=4,
            max_steps=1,
            learning_rate=0.0,
        )
        for _ in range(2):
            output = trainer.predict(trainer.eval_dataset)
            if rank == 0:
                check_predictions(output.predictions, output.label_ids, num_samples)
            trainer.train()
        trainer.close()


@pytest.mark.ranks(2)
def test_objects_are_gathered_as_they_are(tmp_path: Path, rank: int) -> None:
    """eval_use_gather_object: lists of dicts, one entry per sample, of any shape."""
    trainer = make_trainer(
        tmp_path, evaluation=5, per_device_eval_batch_size=2, eval_use_gather_object=True
    )
    step = trainer.prediction_step

    def boxes(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, logits, _ = step(model, inputs, *args, **kwargs)
        return loss, logits, [{"ids": row[:2], "name": "x"} for row in inputs["input_ids"]]

    trainer.prediction_step = boxes
    trainer.compute_metrics = lambda p: {"n": len(p.label_ids)}
    output = trainer.predict(trainer.eval_dataset)
    assert output.metrics["test_n"] == 5
    if rank == 0:
        assert output.predictions.shape[0] == 5
        ids = [entry["ids"].tolist() for entry in output.label_ids]
        assert ids == [sample["input_ids"][:2] for sample in trainer.eval_dataset]
    trainer.args.eval_use_gather_object = False
    with pytest.raises(ValueError, match="eval_use_gather_object"):
        trainer.predict(trainer.eval_dataset)
