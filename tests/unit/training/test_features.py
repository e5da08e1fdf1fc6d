"""Parts of the features among the arguments that need no ranks."""

from __future__ import annotations

import inspect
import math
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain import TrainingArguments
from dstrain.config.resolution.batch import smaller
from dstrain.core.errors import ConfigError, DataError, ModelError
from dstrain.data import Denominator, EpochOrder, LossRule, LossTargets, TokenCount, sample_lengths
from dstrain.reporting.memory import MemoryMetrics
from dstrain.trainer import build
from dstrain.training import compat
from dstrain.training.features import check_features, training_features
from dstrain.training.label_smoothing import LabelSmoothing
from tests.models import RegressionModel, tiny_llama

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


# --- order by length -----------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(0, 9))
def test_grouping_keeps_every_sample_and_begins_with_the_longest(lengths: list[int], epoch: int):
    order = EpochOrder(len(lengths), seed=3, shuffle=True, lengths=lengths)
    indices = order.indices(epoch).tolist()
    assert sorted(indices) == list(range(len(lengths)))
    assert lengths[indices[0]] == max(lengths)
    again = EpochOrder(len(lengths), seed=3, shuffle=True, lengths=torch.tensor(lengths))
    assert again.indices(epoch).tolist() == indices


def test_neighbours_are_of_similar_length_and_epochs_differ():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (4000,), generator=draw)
    order = EpochOrder(4000, seed=1, shuffle=True, lengths=lengths)
    plain = EpochOrder(4000, seed=1, shuffle=True)

    def padding(indices: torch.Tensor) -> float:
        batches = lengths[indices].view(-1, 8)
        return float((batches.max(dim=1).values * 8).sum() / batches.sum())

    assert padding(order.indices(0)) < 1.02
    assert padding(plain.indices(0)) > 1.5
    assert order.indices(0).tolist() != order.indices(1).tolist()


class Unread(torch.utils.data.Dataset[Any]):
    """Counts how often a sample is read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return self.rows[index]


def test_lengths_come_from_the_column_or_from_the_samples():
    rows = {"input_ids": [[1, 2, 3], [1], [1, 2]], "length": [30, 10, 20]}
    table = datasets.Dataset.from_dict(rows)
    assert sample_lengths(table, column="length", main_input="input_ids").tolist() == [30, 10, 20]
    picked = table.select([2, 0])
    assert sample_lengths(picked, column="length", main_input="input_ids").tolist() == [20, 30]
    assert sample_lengths(picked, column="size", main_input="input_ids").tolist() == [2, 3]
    own = Unread([{"input_ids": [1] * 5}, {"input_ids": [1]}])
    assert sample_lengths(own, column="length", main_input="input_ids").tolist() == [5, 1]
    assert own.reads == 2


@pytest.mark.parametrize(
    ("dataset", "text"),
    [(iter([1]), "stream"), ([{"x": 1}], "no 'input_ids'"), ([3], "no 'input_ids'")],
)
def test_what_has_no_lengths_is_refused(dataset: Any, text: str):
    with pytest.raises(DataError, match=text):
        sample_lengths(dataset, column="length", main_input="input_ids")


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_with_and_without_padding(caplog: pytest.LogCaptureFixture):
    ids = torch.tensor([[5, 6, 0], [7, 0, 0]])
    masked = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert TokenCount()(masked) == 6
    assert TokenCount(padding=False)(masked) == 3
    assert TokenCount(padding=False, pad_token_id=0)({"input_ids": ids}) == 3
    unknown = TokenCount(padding=False)
    assert [unknown({"input_ids": ids}) for _ in range(2)] == [6, 6]


# --- smoothing -----------------------------------------------------------------------------------


def known_targets(*, shifted: bool) -> LossTargets:
    rule = LossRule((Denominator("labels", shifted=shifted),))
    return LossTargets(torch.nn.Linear(1, 1), ["labels"], rule=rule)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_smoothed_loss_is_that_of_transformers(shifted: bool):
    from transformers.trainer_pt_utils import LabelSmoother

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=draw)
    labels = torch.tensor([[3, -100, 4, 5, -100], [1, 2, -100, -100, 9]])
    inputs = {"input_ids": labels, "labels": labels}
    expected = LabelSmoother(epsilon=0.3)({"logits": logits}, labels, shift_labels=shifted)
    seen: list[set[str]] = []

    def model(**given: Any) -> dict[str, torch.Tensor]:
        seen.append(set(given))
        return {"logits": logits}

    targets = known_targets(shifted=shifted)
    loss, _ = LabelSmoothing(0.3)(model, None, inputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert seen == [{"input_ids"}]
    assert set(inputs) == {"input_ids", "labels"}, "the batch is as it was"


def test_smoothing_says_what_it_cannot_do(caplog: pytest.LogCaptureFixture):
    smooth, targets = LabelSmoothing(0.1), known_targets(shifted=False)
    for inputs, text in (
        ({"x": torch.ones(2)}, "no labels"),
        ({"labels": torch.ones(2)}, "no class indices"),
        ({"labels": torch.ones(2, dtype=torch.long)}, "no logits"),
    ):
        with pytest.raises(ModelError, match=text):
            smooth(lambda **kwargs: {}, None, inputs, targets)
    model = tiny_llama(problem_type="multi_label_classification")
    args = TrainingArguments(label_smoothing_factor=0.1)
    assert LabelSmoothing.of(model, args) is None


# --- what a model or machine cannot do -----------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"gradient_checkpointing": True}, "no gradient_checkpointing_enable"),
        ({"neftune_noise_alpha": 5.0}, "no get_input_embeddings"),
        ({"use_liger_kernel": True}, "liger-kernel is not installed"),
        ({"use_liger_kernel": True}, "for GPUs"),
        ({"use_liger_kernel": True}, "transformers' models only"),
        ({"torch_compile_backend": "inducter"}, "did you mean 'inductor'"),
        ({"torch_compile_mode": "fast"}, "max-autotune"),
        ({"torch_compile_mode": "default", "torch_compile_backend": "eager"}, "only inductor"),
    ],
)
def test_features_that_cannot_be_had_are_refused_at_once(given: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        check_features(RegressionModel(), TrainingArguments(**given), device="cpu")
    if text == "for GPUs":
        with pytest.raises(ConfigError) as caught:
            check_features(RegressionModel(), TrainingArguments(**given), device="cuda")
        assert text not in str(caught.value)


def test_noise_has_the_size_that_its_authors_gave():
    """Uniform in +-alpha / sqrt(length x width), drawn anew each time, and only in training."""
    model = tiny_llama()
    embeddings = model.get_input_embeddings()
    ids = torch.arange(3, 35)[None]
    clean = embeddings(ids)
    with training_features(model, TrainingArguments(neftune_noise_alpha=5.0)):
        model.train()
        first, second = embeddings(ids) - clean, embeddings(ids) - clean
        model.eval()
        assert torch.equal(embeddings(ids), clean)
    bound = 5.0 / math.sqrt(32 * 64)
    assert 0.98 * bound < first.abs().max() <= bound * 1.001
    assert first.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(first, second)
    model.train()
    assert torch.equal(embeddings(ids), clean)


@pytest.mark.parametrize(
    ("micro", "accumulation", "expected"),
    [(8, 1, (4, 2)), (8, 3, (4, 6)), (7, 1, (1, 7)), (6, 1, (3, 2)), (3, 2, (1, 6)), (1, 8, None)],
)
def test_a_smaller_micro_batch_keeps_the_samples_of_a_step(micro, accumulation, expected):
    assert smaller(micro, accumulation) == expected


def test_the_door_to_liger_is_as_it_was():
    """A kernel cannot be run here; what transformers takes and says can be looked at."""
    assert list(inspect.signature(compat.apply_liger_kernel).parameters) == [
        "model",
        "kernel_config",
    ]
    with pytest.raises(ImportError, match="liger-kernel"):
        compat.apply_liger_kernel(tiny_llama(), None)


# --- schedules that follow a metric --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("greater", [True, False])
def test_the_direction_of_the_metric_is_that_of_the_best_model(kind: str, greater: bool):
    args = TrainingArguments(lr_scheduler_type=kind, eval_strategy="epoch")
    args.greater_is_better = greater
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    made = build.scheduler_factory(args, 10)(optimizer)
    assert made.mode == ("max" if greater else "min")


# --- memory --------------------------------------------------------------------------------------


def test_memory_of_a_stage_and_not_of_one_inside_it():
    memory = MemoryMetrics(enabled=True)
    memory.start("init")
    assert memory.stop("init") == {}
    memory.start("train")
    memory.start("eval")
    assert memory.stop("eval") == {}
    held = torch.ones(40 * 2**20 // 4)
    temporary = torch.ones(80 * 2**20 // 4)
    import time

    time.sleep(0.05)
    del temporary
    figures = memory.stop("train")
    assert held.numel()
    assert 35e6 < figures["train_mem_cpu_alloc_delta"] < 60e6
    assert 60e6 < figures["train_mem_cpu_peaked_delta"] < 110e6
    assert "init_mem_cpu_alloc_delta" in figures
    off = MemoryMetrics(enabled=False)
    off.start("train")
    assert off.stop("train") == {}
