"""The loss that is optimised is the model's own, whatever its class and however a batch is cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.families.zoo import FAMILIES
from tests.models import IGNORE_INDEX, RaggedTokens, pad_collate, tiny_llama

GLOBAL_BATCH = 8
SPLITS = ((4, 1), (2, 2), (1, 4))  # of a global batch on two ranks: micro-batch, accumulation


def trained(folder: Path, model: Any, data: Any, collate: Any, **arguments: Any) -> Any:
    """Train, and return the trainer."""
    from dstrain import Trainer, TrainingArguments

    cls = arguments.pop("cls", Trainer)
    settings: dict[str, Any] = {
        "zero_stage": "2",
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "label_names": None,
        **arguments,
    }
    args = TrainingArguments(str(folder), **settings)
    trainer = cls(model, args, data_collator=collate, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


def first_figures(trainer: Any) -> tuple[float, float]:
    """Return loss and gradient norm of the first step."""
    first = trainer.state.log_history[0]
    return first["loss"], first["grad_norm"]


def family_data(name: str) -> list[Any]:
    return FAMILIES[name].samples(GLOBAL_BATCH)


# --- smoothed labels -----------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["gpt2", "bert_decoder", "ctrl", "llama_subclass", "bart_decoder"])
def test_smoothing_shifts_labels_where_the_model_does(name: str, tmp_path: Path) -> None:
    """GPT-2 with its labels not shifted learns to copy its input: transformers names no loss type.

    BART's decoder alone does not shift, though it is a causal language model.
    """
    from transformers.trainer_pt_utils import LabelSmoother

    family = FAMILIES[name]
    batch = family.collate(family_data(name))
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = family.build().train()(**batch)
    shifts = name != "bart_decoder"
    wanted = LabelSmoother(epsilon=0.2)(outputs, labels, shift_labels=shifts).item()
    for micro, accumulation in SPLITS:
        trainer = trained(
            tmp_path,
            family.build(),
            family_data(name),
            family.collate,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=0.2,
            max_steps=2,
        )
        assert first_figures(trainer)[0] == pytest.approx(wanted, rel=1e-5)
        trainer.close()


# --- several label columns -----------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("micro", [1, 4])
def test_a_head_without_labels_does_not_stop_the_other_from_training(
    micro: int, tmp_path: Path
) -> None:
    """Rows have a label for one of two heads, at micro-batch 1 none has both."""
    family = FAMILIES["two_heads"]
    model = family.build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trained(
        tmp_path,
        model,
        family_data("two_heads"),
        family.collate,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
    )
    loss, _ = first_figures(trainer)
    assert loss > 0.5
    assert trainer.evaluate()["eval_loss"] > 0.5
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert {"head_a.weight", "head_b.weight", "body.weight"} <= moved
    trainer.close()


@pytest.mark.ranks(2)
def test_a_pretraining_batch_without_masked_tokens_trains_the_other_head(tmp_path: Path) -> None:
    """BERT's loss is a mean over masked tokens plus one over sentences; here there are none."""
    family = FAMILIES["bert_pretraining"]
    rows = family_data("bert_pretraining")
    for row in rows:
        row["labels"] = torch.full_like(row["labels"], IGNORE_INDEX)
    model = family.build()
    before = model.cls.seq_relationship.weight.detach().clone()
    trainer = trained(tmp_path, model, rows, family.collate, per_device_train_batch_size=4)
    assert 0.3 < first_figures(trainer)[0] < 3
    assert not torch.equal(model.cls.seq_relationship.weight.detach(), before)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["bert_answers", "bert_pretraining", "segformer_frozen"])
def test_samples_without_a_target_of_one_kind_change_no_split(name: str, tmp_path: Path) -> None:
    """An answer outside of the text, no masked token, an image of nothing but 255: NaN alone."""
    check_splits(name, SPLITS, tmp_path)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", ["bert_answers", "bert_pretraining"])
def test_a_loss_of_several_means_trains_in_one_process(name: str, tmp_path: Path) -> None:
    """One process sums over no other; the first answer models that it was given ended there."""
    check_splits(name, ((GLOBAL_BATCH, 1), (2, 4)), tmp_path)


def check_splits(name: str, splits: Sequence[tuple[int, int]], tmp_path: Path) -> None:
    """Compare loss and gradient of a step with plain torch, for micro-batch and accumulation."""
    family = FAMILIES[name]
    rows = family_data(name)
    for row in rows[::3]:
        for key, ignored in (("start_positions", 10_000), ("labels", None)):
            if key in row:
                row[key] = torch.full_like(row[key], ignored or family.ignored)
    whole = family.collate(rows)
    model = family.build().train()
    loss = model(**whole).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for micro, accumulation in splits:
        trainer = trained(
            tmp_path,
            family.build(),
            rows,
            family.collate,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        assert first_figures(trainer) == pytest.approx((loss.item(), norm.item()), rel=1e-4)
        trainer.close()


# --- no targets ----------------------------------------------------------------------------------


class WithoutLabels(RaggedTokens):
    """All labels ignored, from one sample on up to another."""

    def __init__(self, num_examples: int, *, empty: Sequence[int]) -> None:
        super().__init__(num_examples)
        for index in empty:
            labels = self.examples[index]["labels"]
            self.examples[index]["labels"] = [IGNORE_INDEX] * len(labels)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("max_steps", [2, 8])
def test_a_run_that_begins_without_any_target_ends_and_shows_a_row(
    max_steps: int, tmp_path: Path
) -> None:
    """A template that matches nothing masks every label; the log would say loss 0.0."""
    from dstrain.core.errors import DataError

    data = WithoutLabels(32, empty=range(32))
    with pytest.raises(DataError, match="have no target") as error:
        trained(
            tmp_path,
            tiny_llama(),
            data,
            pad_collate,
            per_device_train_batch_size=2,
            max_steps=max_steps,
        )
    text = str(error.value)
    assert "labels: [-100, -100" in text
    assert "input_ids: [" in text
    assert f"first {min(3, max_steps)} global batches" in text


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", ["0", "3"])
def test_single_batches_without_targets_go_on(stage: str, tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        tiny_llama(),
        WithoutLabels(16, empty=range(0, 16, 2)),
        pad_collate,
        per_device_train_batch_size=1,
        max_steps=8,
        zero_stage=stage,
    )
    assert trainer.state.global_step == 8
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    trainer.close()


@pytest.mark.ranks(2)
def test_an_evaluation_without_targets_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    trainer = trained(tmp_path, tiny_llama(), RaggedTokens(8), pad_collate)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate(WithoutLabels(5, empty=range(5)))
    assert "eval_loss" not in metrics
    assert ("no eval_loss: the 5 samples have no target" in caplog.text) == (rank == 0)
    trainer.close()


# --- what is counted, and who is told ------------------------------------------------------------


class Counting(nn.Module):
    """Divides a summed loss by the count that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.counts: list[Any] = []

    def forward(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        num_items_in_batch: Any = None,
    ) -> Any:
        self.counts.append(num_items_in_batch)
        logits = self.inner(input_ids).logits[:, :-1].flatten(0, 1)
        kinds: dict[str, Any] = {"reduction": "mean" if num_items_in_batch is None else "sum"}
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), **kinds)
        return loss / (num_items_in_batch or 1), logits


@pytest.mark.ranks(2)
@pytest.mark.parametrize("accepts", [True, False])
def test_a_model_that_takes_the_count_is_given_it(accepts: bool, tmp_path: Path) -> None:
    """As transformers does, and `model_accepts_loss_kwargs = False` turns it off."""
    from dstrain import Trainer

    class Mine(Trainer):
        """Says what its model takes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = accepts

    found = []
    for micro, accumulation in SPLITS:
        model = Counting()
        trainer = trained(
            tmp_path,
            model,
            RaggedTokens(8),
            pad_collate,
            cls=Mine,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        told = [count is not None for count in model.counts]
        assert told == [accepts and index > 0 for index in range(len(told))]
        found.append((*first_figures(trainer), trainer.evaluate()["eval_loss"]))
        trainer.close()
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2


@pytest.mark.ranks(2)
def test_training_and_evaluation_are_watched_each_for_itself(tmp_path: Path) -> None:
    """Without labels nothing is learned, and nothing lost."""
    from dstrain import Trainer, TrainingArguments

    family = FAMILIES["llama_wrapped"]
    rows = family_data("llama_wrapped")
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(
        family.build(), args, data_collator=family.collate, train_dataset=rows, eval_dataset=rows
    )
    trainer.predict(bare, ignore_keys=["past_key_values"])
    assert "eval_loss" in trainer.evaluate()
    assert not trainer.targets.settled
    trainer.train()
    assert trainer.targets.is_exact
    assert "after the first of a sequence" in str(trainer.targets.rule)
    trainer.close()


@pytest.mark.ranks(1)
def test_an_evaluation_whose_batches_never_tell_holds_a_few_of_them(tmp_path: Path) -> None:
    """A column without a label leaves the rule open; memory must not grow with the evaluation."""
    import gc

    from transformers import TrainerCallback

    from dstrain import Trainer, TrainingArguments
    from dstrain.evaluation import EvalBatch

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x: Any, labels_a: Any = None, labels_b: Any = None) -> Any:
            logits = self.head(x)
            return nn.functional.cross_entropy(logits, labels_a), logits

    class Counts(TrainerCallback):
        most = 0

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            held = sum(isinstance(found, EvalBatch) for found in gc.get_objects())
            self.most = max(self.most, held)

    empty = torch.tensor(-100)
    rows = [{"x": torch.randn(2), "labels_a": torch.tensor(1), "labels_b": empty}] * 40
    args = TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=1,
        label_names=["labels_a", "labels_b"],
        report_to="none",
        disable_tqdm=True,
    )
    counts = Counts()
    trainer = Trainer(Heads(), args, eval_dataset=rows, callbacks=[counts])
    assert "eval_loss" in trainer.evaluate()
    assert counts.most <= 12, "8 are held, and those on their way"
