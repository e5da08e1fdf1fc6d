"""Counting the targets of a batch: the weight of its mean loss, so a miscount bends the curve."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from dstrain.data import (
    Denominator,
    LossRule,
    LossTargets,
    batch_size,
    forward_columns,
    input_tokens,
    label_columns,
    to_device,
)
from dstrain.data.loss.rule import expected_rule
from dstrain.data.samples import tensors
from tests.models import RegressionModel, tiny_llama

PLAIN = Denominator("labels")
SHIFTED = Denominator("labels", shifted=True)
TOKENS = torch.tensor([[5, 6, 7], [8, 9, 0]])
IGNORED = -100


# --- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "labels", "expected"),
    [
        (PLAIN, [[5, 6, 7], [8, 9, -100]], 5),
        (SHIFTED, [[5, 6, 7], [8, 9, -100]], 3),  # the first token of a sequence is no target
        (SHIFTED, [[-100, 6, 7], [-100, -100, -100]], 2),
        (PLAIN, [[-100, -100]], 0),
        (SHIFTED, [[5]], 0),  # one token predicts nothing
        (PLAIN, [3, 1, -100], 2),  # one class per sample
        (SHIFTED, [3, 1, 2], 3),  # has no position to shift
    ],
)
def test_integer_labels_count_where_they_are_not_ignored(targets, labels, expected):
    batch = {"labels": torch.tensor(labels)}
    assert targets.count(batch, len(labels)) == expected


@pytest.mark.parametrize("targets", [PLAIN, SHIFTED])
def test_the_count_is_that_of_the_loss(targets):
    """Against torch: the sum over targets divided by their mean is the number of targets."""
    labels = torch.tensor([[5, -100, 7, 1], [8, 9, -100, -100]])
    logits = torch.randn(2, 4, 11)
    if targets.shifted:
        logits, kept = logits[:, :-1], labels[:, 1:]
    else:
        kept = labels
    flat = logits.reshape(-1, 11), kept.reshape(-1)
    ratio = nn.functional.cross_entropy(*flat, reduction="sum") / nn.functional.cross_entropy(*flat)
    assert targets.count({"labels": labels}, 2) == round(ratio.item())


def test_the_count_of_a_causal_model_is_that_of_its_own_loss():
    """transformers shifts inside the model; its mean times our count must be the sum of losses."""
    model = tiny_llama()
    inputs = torch.randint(3, 200, (2, 9))
    labels = inputs.clone()
    labels[0, :5] = IGNORED
    with torch.no_grad():
        output = model(input_ids=inputs, labels=labels)
    sums = nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, output.logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        reduction="sum",
    )
    targets = LossTargets(model, label_columns(model, None))
    (count,) = targets.counts({"input_ids": inputs, "labels": labels})
    assert count * output.loss.item() == pytest.approx(sums.item(), rel=1e-5)


def test_shift_labels_are_shifted_already_and_come_first():
    """Sequence-parallel collators pass them; each of their positions is a target."""
    shifted = torch.tensor([[6, 7, -100]])
    assert SHIFTED.count({"labels": TOKENS, "shift_labels": shifted}, 1) == 2
    assert SHIFTED.count({"shift_labels": shifted}, 1) == 2


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.zeros(4, 3), "labels": torch.zeros(4)},  # regression
        {"x": torch.zeros(4, 3), "labels": torch.full((4, 6), -100.0)},  # multi-label, floats
        {"x": torch.zeros(4, 3)},  # no labels: the model knows its own loss
        {"x": torch.zeros(4, 3), "labels": None},
        {"x": torch.zeros(4, 3), "labels": torch.tensor(3)},
        (torch.zeros(4, 3), torch.zeros(4)),
        torch.zeros(4, 3),
    ],
    ids=["float", "float_matrix", "none", "null", "scalar", "tuple", "tensor"],
)
def test_without_integer_labels_samples_are_counted(inputs):
    assert LossRule((PLAIN,)).counts(inputs) == (4,)


def test_positions_count_where_they_lie_inside_of_the_input():
    """An answer that was cut off is no target of its own head, and may be one of the other."""
    rule = LossRule(
        tuple(
            Denominator(name, ignored=None, bound="input_ids")
            for name in ("start_positions", "end_positions")
        )
    )
    batch = {
        "input_ids": TOKENS,
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([2, 3]),  # of three tokens
    }
    assert rule.counts(batch) == (2, 1)


def test_a_mask_says_where_labels_are_targets():
    batch = {"labels": TOKENS, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert Denominator("labels", ignored=None, mask="attention_mask").count(batch, 2) == 3
    assert Denominator("labels", shifted=True, mask="attention_mask").count(batch, 2) == 1


@pytest.mark.parametrize(
    ("loss_type", "is_encoder_decoder", "shifted"),
    [
        ("ForCausalLM", False, True),
        ("ForConditionalGeneration", False, True),
        ("ForConditionalGeneration", True, False),  # T5 has shifted its decoder's inputs
        ("ForMaskedLM", False, False),
        (None, False, False),
    ],
)
def test_the_rule_follows_the_loss_that_transformers_gives_a_model(
    loss_type, is_encoder_decoder, shifted
):
    module = nn.Linear(1, 1)
    module.loss_type = loss_type
    module.config = type("Config", (), {"is_encoder_decoder": is_encoder_decoder})()
    assert expected_rule(module, ["labels"]) == LossRule((Denominator("labels", shifted=shifted),))


def test_a_plain_module_is_not_shifted():
    assert not expected_rule(nn.Linear(1, 1), ["labels"]).parts[0].shifted


def test_a_subclass_is_guessed_by_its_ancestors():
    """transformers goes by the name of the class itself, which an author chooses freely."""
    from tests.models import tiny_llama

    llama = tiny_llama()

    class Mine(type(llama)):  # type: ignore[misc]
        """A causal language model under another name."""

    llama.__class__, llama.loss_type = Mine, None
    assert expected_rule(llama, ["labels"]).parts[0].shifted


# --- neutralising --------------------------------------------------------------------------------


def test_without_ignored_gives_a_finite_loss_that_can_carry_weight_zero():
    """0/0 is NaN, and NaN times 0 stays NaN: one such micro-batch would destroy the weights."""
    labels = torch.full((2, 4), IGNORED)
    logits = torch.randn(2, 4, 11, requires_grad=True)
    assert nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).isnan()
    changed = PLAIN.without_ignored({"labels": labels})["labels"]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), changed.flatten()) * 0.0
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_without_ignored_changes_labels_only_and_in_a_copy():
    labels = torch.tensor([[IGNORED, 4]])
    given = {
        "input_ids": labels,
        "labels": labels,
        "shift_labels": labels,
        "weights": torch.tensor([-100.0]),
    }
    changed = PLAIN.without_ignored(given)
    assert changed["labels"].tolist() == changed["shift_labels"].tolist() == [[0, 4]]
    assert changed["input_ids"] is labels
    assert changed["weights"] is given["weights"]
    assert given["labels"].tolist() == [[IGNORED, 4]]


def test_without_ignored_leaves_float_labels_and_other_batches_alone():
    floats = torch.tensor([-100.0, 1.0])
    assert PLAIN.without_ignored({"labels": floats})["labels"] is floats
    assert PLAIN.without_ignored(TOKENS) is TOKENS


# --- batches of any nesting ----------------------------------------------------------------------


class Pair(NamedTuple):
    """A batch as a named tuple."""

    ids: torch.Tensor
    scores: torch.Tensor


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"a": torch.zeros(3, 2)}, 3),
        ({"a": {"b": [torch.zeros(3, 2)]}}, 3),
        ({"temperature": torch.tensor(1.0), "a": torch.zeros(3, 2)}, 3),  # scalars have no samples
        ({"name": "x", "a": torch.zeros(3)}, 3),
        (Pair(torch.zeros(3), torch.zeros(3)), 3),
        ([torch.zeros(3)], 3),
        ({"name": "x"}, 1),
        # Patches of images come before the rows of text (Qwen2-VL).
        ({"pixel_values": torch.zeros(60, 3), "labels": torch.zeros(10, 4)}, 10),
        ({"pixel_values": torch.zeros(60, 3), "input_ids": torch.zeros(10, 4)}, 10),
        ({"x": torch.zeros(8, 2), "class_labels": [torch.zeros(5), torch.zeros(2)]}, 2),
        # Padding-free: the sequences that begin in the one row.
        ({"input_ids": TOKENS[:1], "position_ids": torch.tensor([[0, 1, 0]])}, 2),
        ({"input_ids": TOKENS[:1], "cu_seq_lens_q": torch.tensor([0, 1, 2, 3])}, 3),
        ({"input_ids": TOKENS, "position_ids": torch.zeros(2, 3)}, 2),
    ],
)
def test_batch_size_of_a_users_own_loader(inputs, expected):
    assert batch_size(inputs) == expected


def test_tensors_of_any_nesting():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [t.numel() for t in tensors({"x": a, "y": [b, (c, "text", None)]})] == [1, 2, 3]


@pytest.mark.parametrize(
    ("inputs", "main_input", "expected"),
    [
        ({"input_ids": TOKENS, "labels": TOKENS}, "input_ids", 6),  # padding included
        ({"input_ids": TOKENS, "pixel_values": torch.zeros(2, 3)}, "pixel_values", 2),
        ({"decoder_ids": TOKENS}, "decoder_ids", 6),
        ({"x": torch.zeros(4, 8)}, "input_ids", 4),
        ((torch.zeros(4, 8),), "input_ids", 4),
    ],
)
def test_input_tokens_counts_what_the_model_reads(inputs, main_input, expected):
    assert input_tokens(inputs, main_input) == expected


def test_to_device_keeps_the_structure_and_casts_floats_only():
    """Ids in 16 bits would be wrong from 2049 on; a mask in floats would be another mask."""
    given = {
        "ids": torch.tensor([2049]),
        "mask": torch.tensor([True]),
        "pair": Pair(torch.tensor([1]), torch.tensor([0.5])),
        "list": [torch.zeros(1), "text", 7, None],
        "tuple": (torch.zeros(1),),
    }
    moved: dict[str, Any] = to_device(given, "meta", float_dtype=torch.bfloat16)
    assert moved["ids"].dtype == torch.int64
    assert moved["mask"].dtype == torch.bool
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].scores.dtype == torch.bfloat16
    assert moved["list"][0].dtype == torch.bfloat16
    assert moved["list"][1:] == ["text", 7, None]
    assert isinstance(moved["tuple"], tuple)
    assert {t.device.type for t in tensors(moved)} == {"meta"}


def test_to_device_without_a_format_keeps_floats():
    assert to_device({"x": torch.zeros(1)}, "cpu", float_dtype=None)["x"].dtype == torch.float32


def test_to_device_takes_what_tokenizers_return():
    from transformers import BatchEncoding

    moved = to_device(BatchEncoding({"input_ids": TOKENS}), "meta", float_dtype=None)
    assert moved["input_ids"].device.type == "meta"


# --- columns of a model --------------------------------------------------------------------------


class ForQuestionAnswering(nn.Module):
    """Its name is what transformers goes by."""

    def forward(self, input_ids: Any, *, start_positions: Any = None) -> Any: ...


class TakesAnything(nn.Module):
    """Its signature says nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class TwoLabels(nn.Module):
    """Two names with "label" in them."""

    def forward(self, x: Any, label_ids: Any, next_sentence_label: Any, **kwargs: Any) -> Any: ...


def test_forward_columns_are_the_named_arguments():
    assert forward_columns(RegressionModel()) == ["x", "labels"]
    assert forward_columns(TwoLabels()) == ["x", "label_ids", "next_sentence_label"]
    assert forward_columns(ForQuestionAnswering()) == ["input_ids", "start_positions"]


def test_a_signature_that_says_nothing_drops_no_column():
    assert forward_columns(TakesAnything()) is None


def test_label_columns_are_found_by_name():
    assert label_columns(RegressionModel(), None) == ["labels"]
    assert label_columns(TwoLabels(), None) == ["label_ids", "next_sentence_label"]
    assert label_columns(ForQuestionAnswering(), None) == ["start_positions", "end_positions"]
    assert label_columns(TakesAnything(), None) == ["labels"]


def test_label_columns_given_by_the_user_are_taken_even_when_empty():
    """``label_names=[]`` says that there are none; it must not mean "find them"."""
    assert label_columns(RegressionModel(), ["x"]) == ["x"]
    assert label_columns(RegressionModel(), []) == []


def test_transformers_names_its_causal_models():
    """By name only: importing all of them would take minutes."""
    from dstrain.data.compat import causal_lm_names

    assert {"GPT2LMHeadModel", "LlamaForCausalLM", "CTRLLMHeadModel"} <= causal_lm_names()
