"""Prediction: every sample once and in order, on rank 0 alone; metrics once, known to all ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from tests.distributed.runs import make_trainer
from tests.models import RaggedTokens, pad_collate, tiny_llama

EVERYTHING_WIDE = {
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
}


class Spy:
    """A compute_metrics that keeps what it was given."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[Any] = []
        self.fails = fails

    def __call__(self, prediction: Any) -> dict[str, Any]:
        self.calls.append(prediction)
        if self.fails:
            raise RuntimeError(self.fails)
        right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"right": np.float64(right[prediction.label_ids[:, 1:] != -100].mean())}


class Stream(IterableDataset[Any]):
    """A stream of samples without a length."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        yield from self.samples


def _expected(num_samples: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Compute logits and labels of each sample by a forward pass of its own."""
    logits, labels = [], []
    model = tiny_llama()
    for sample in RaggedTokens(num_samples, seed=99):
        batch = pad_collate([sample])
        with torch.no_grad():
            logits.append(model(**batch).logits[0].numpy())
        labels.append(np.array(sample["labels"]))
    return logits, labels


def _check(predictions: np.ndarray, label_ids: np.ndarray, num_samples: int) -> None:
    logits, labels = _expected(num_samples)
    assert predictions.shape == (num_samples, max(map(len, logits)), logits[0].shape[-1])
    assert label_ids.shape == predictions.shape[:2]
    for index, (row, row_labels) in enumerate(zip(logits, labels, strict=True)):
        np.testing.assert_allclose(predictions[index, : len(row)], row, rtol=1e-4, atol=1e-5)
        assert label_ids[index, : len(row)].tolist() == row_labels.tolist()
        assert (label_ids[index, len(row) :] == -100).all()


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
                _check(seen.predictions, seen.label_ids, num_samples)
                _check(output.predictions, output.label_ids, num_samples)
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
            logits, labels = _expected(7)
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
    logits, _ = _expected(7)
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


@pytest.mark.ranks(2)
def test_errors_of_a_metric_are_raised_on_all_ranks(tmp_path: Path) -> None:
    """Whatever it raises or returns, no rank waits for another; predictions that vary likewise."""
    from dstrain.core.errors import DataError

    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = Spy("metric of rank 0")
    with pytest.raises(RuntimeError, match="metric of rank 0"):
        trainer.evaluate()
    trainer.compute_metrics = lambda prediction: 3
    with pytest.raises(DataError, match="returned int"):
        trainer.evaluate()

    def unpicklable(prediction: Any) -> Any:
        raise type("Local", (Exception,), {})("cannot be sent")

    trainer.compute_metrics = unpicklable
    with pytest.raises(Exception, match="cannot be sent"):
        trainer.evaluate()
    trainer.compute_metrics = Spy()
    step = trainer.prediction_step
    calls: list[int] = []

    def varies(*args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = step(*args, **kwargs)
        calls.append(0)
        other = len(calls) == 2 and trainer.ranks.rank == 1
        return loss, (logits, logits) if other else logits, labels

    trainer.prediction_step = varies
    trainer.args.per_device_eval_batch_size = 1
    with pytest.raises(DataError, match="not nested or formatted"):
        trainer.evaluate()
    calls.clear()

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3 and trainer.ranks.rank == 1:
            raise MemoryError("rank 1 alone")
        return step(*args, **kwargs)

    trainer.prediction_step = breaks
    for every in (1, 2, 8):
        trainer.args.eval_accumulation_steps = every
        calls.clear()
        with pytest.raises(MemoryError, match="rank 1 alone"):
            trainer.evaluate()
    trainer.prediction_step = step
    assert 0 <= trainer.evaluate()["eval_right"] <= 1


class Breaking(TrainerCallback):
    """Raises on rank 1 after some batch of an evaluation."""

    def __init__(self, rank: int) -> None:
        self.rank, self.seen, self.at = rank, 0, 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += 1
        if self.rank == 1 and self.seen == self.at:
            raise ArithmeticError("callback of rank 1")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_errors_after_a_forward_pass_are_raised_on_all_ranks(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """Also where the others go into forward passes that are collectives before they hear of it."""
    breaking = Breaking(rank)
    trainer = make_trainer(
        tmp_path, stage=stage, deepspeed=EVERYTHING_WIDE if stage == 3 else None,
        per_device_eval_batch_size=1, callbacks=[breaking],
    )  # fmt: skip
    num_batches = 4

    def breaks_at(batch: int) -> Any:
        calls: list[int] = []

        def reduce(logits: Any, labels: Any) -> Any:
            calls.append(0)
            if rank == 1 and len(calls) == batch:
                raise MemoryError("logits of rank 1")
            return logits.argmax(-1)

        return reduce

    trainer.compute_metrics = lambda prediction: {"n": len(prediction.predictions)}
    for every in (1, 3):
        trainer.args.eval_accumulation_steps = every
        for batch in (1, 2, num_batches):
            breaking.at, breaking.seen = batch, 0
            with pytest.raises(ArithmeticError, match="callback of rank 1"):
                trainer.evaluate()
            breaking.at = 0
            trainer.preprocess_logits_for_metrics = breaks_at(batch)
            with pytest.raises(MemoryError, match="logits of rank 1"):
                trainer.evaluate()
            trainer.preprocess_logits_for_metrics = breaks_at(0)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.close()


class BatchedAccuracy:
    """Counts right tokens batch by batch."""

    def __init__(self, fails_at: int = -1) -> None:
        self.right = self.all = self.calls = 0
        self.fails_at = fails_at

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        assert isinstance(prediction.predictions, torch.Tensor)
        if self.calls == self.fails_at:
            raise ArithmeticError("batch metric")
        self.calls += 1
        labels = prediction.label_ids[:, 1:]
        real = labels != -100
        right = (prediction.predictions.argmax(-1)[:, :-1] == labels) & real
        self.right += int(right.sum())
        self.all += int(real.sum())
        if not compute_result:
            return {}
        return {"right": self.right / self.all, "targets": self.all, "calls": self.calls}


@pytest.mark.parametrize(
    "world_size_wanted", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3)]
)
def test_batch_metrics_keep_nothing_and_are_exact(
    world_size_wanted: int, tmp_path: Path, rank: int
) -> None:
    """Same figure as from all predictions; the last call is told so, for streams as well."""
    for num_samples in (1, 7):
        data = list(RaggedTokens(num_samples, seed=99))
        whole = make_trainer(tmp_path, evaluation=data)
        whole.compute_metrics = Spy()
        expected = whole.evaluate()["eval_right"]
        for dataset in (data, Stream(data)):
            trainer = make_trainer(
                tmp_path,
                evaluation=dataset,
                per_device_eval_batch_size=2,
                batch_eval_metrics=True,
                eval_accumulation_steps=2,
            )
            trainer.compute_metrics = metric = BatchedAccuracy()
            found = trainer.evaluate()
            assert found["eval_right"] == pytest.approx(expected, abs=1e-12)
            assert found["eval_targets"] == sum(
                sum(x != -100 for x in s["labels"][1:]) for s in data
            )
            assert found["eval_calls"] == -(-num_samples // (2 * trainer.ranks.world_size))
            assert metric.calls == (found["eval_calls"] if rank == 0 else 0)
            trainer.compute_metrics = BatchedAccuracy()
            output = trainer.predict(dataset)  # which must return them all the same
            assert output.metrics["test_right"] == found["eval_right"]
            if rank == 0:
                _check(output.predictions, output.label_ids, num_samples)
            trainer.compute_metrics = BatchedAccuracy(fails_at=0)
            with pytest.raises(ArithmeticError, match="batch metric"):
                trainer.evaluate()


@pytest.mark.ranks(2)
def test_batch_metrics_need_their_argument(tmp_path: Path) -> None:
    """Found when the trainer is built, not after a training."""
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(str(tmp_path), batch_eval_metrics=True, report_to="none")
    with pytest.raises(ValueError, match="compute_result"):
        Trainer(tiny_llama(), args, compute_metrics=Spy())


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
                _check(output.predictions, output.label_ids, num_samples)
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


@pytest.mark.ranks(2)
def test_a_full_disk_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 alone writes; the others must not wait for it."""
    from dstrain.core.errors import TrainingError

    trainer = make_trainer(tmp_path, eval_memory_mb=0, per_device_eval_batch_size=1)
    trainer.compute_metrics = Spy()
    trainer.args.output_dir = str(tmp_path / "not" / "there")
    with pytest.raises(TrainingError, match="cannot be written to disk"):
        trainer.evaluate()


@pytest.mark.ranks(1)
def test_loaders_with_processes_are_kept_by_name(tmp_path: Path) -> None:
    """Persistent workers outlive an evaluation; another dataset never gets a kept loader."""
    sets = {"a": RaggedTokens(2, seed=99), "b": RaggedTokens(3, seed=1)}
    trainer = make_trainer(
        tmp_path,
        evaluation=sets,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    assert trainer.get_eval_dataloader("a") is trainer.get_eval_dataloader("a")
    assert trainer.get_eval_dataloader("b") is not trainer.get_eval_dataloader("a")
    assert len(trainer.get_eval_dataloader(sets["b"]).dataset) == 3
    once, again = trainer.evaluate(), trainer.evaluate()
    assert once["eval_a_loss"] == again["eval_a_loss"]
    trainer.eval_dataset = {"a": sets["b"]}
    assert trainer.evaluate()["eval_a_loss"] == once["eval_b_loss"]
    trainer.close()
    assert not multiprocessing.active_children()


@pytest.mark.ranks(2)
def test_evaluations_come_when_the_arguments_say(tmp_path: Path) -> None:
    """eval_on_start, eval_steps as a share of all steps, eval_delay."""
    for settings, expected in (
        ({"eval_steps": 0.3, "eval_on_start": True}, [0, 3, 6, 9, 10]),
        ({"eval_steps": 2, "eval_delay": 5}, [6, 8, 10]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8, 10]),
    ):
        trainer = make_trainer(
            tmp_path,
            **{"eval_strategy": "steps", "max_steps": 10, "logging_steps": 50, **settings},
        )
        trainer.train()
        history = trainer.state.log_history
        assert [e["step"] for e in history if "eval_loss" in e] == expected
        trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 2])
def test_full_evaluation_in_16_bits_leaves_training_alone(stage: int, tmp_path: Path) -> None:
    """Weights, their memory and the curve stay as they were; at stage 3 it is refused."""
    from dstrain.core.errors import ConfigError

    curves = []
    for full in (True, False):
        trainer = make_trainer(tmp_path, stage=stage, bf16_full_eval=full)
        seen: list[torch.dtype] = []
        trainer.model.lm_head.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        places = [p.data_ptr() for p in trainer.model.parameters()]
        seen.clear()
        trainer.evaluate()
        assert set(seen) == {torch.bfloat16 if full else torch.float32}
        assert [p.data_ptr() for p in trainer.model.parameters()] == places
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        trainer.train()
        curves.append(([e["loss"] for e in trainer.state.log_history if "loss" in e], before))
        trainer.close()
    assert curves[0][0] == curves[1][0]
    assert curves[0][1] != curves[1][1]
    assert curves[0][1] == pytest.approx(curves[1][1], rel=1e-2)
    with pytest.raises(ConfigError, match="bf16_full_eval=True at ZeRO stage 3"):
        make_trainer(tmp_path, stage=3, bf16_full_eval=True)
    make_trainer(tmp_path, stage=3, bf16_full_eval=True, bf16=True).close()
