"""Records of arguments: no token is written, and what is read back is the same."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest

from dstrain.arguments import (
    SentenceTransformerTrainingArguments,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)
from dstrain.core.errors import ConfigError


@dataclass
class WithToken(TrainingArguments):
    """A user's arguments, decorated as everyone does."""

    tracker_token: str | None = None


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        lambda args: args.to_json_string(),
        lambda args: str(args.to_dict()),
        lambda args: str(args.to_sanitized_dict()),
    ],
)
def test_tokens_are_never_written_down(show):
    text = show(WithToken("out", hub_token="secret", tracker_token="secret"))
    assert "secret" not in text
    assert "<HUB_TOKEN>" in text
    assert "<TRACKER_TOKEN>" in text


def test_a_token_of_the_wrong_type_is_not_shown_either():
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(hub_token=["secret"])
    assert "secret" not in str(caught.value)


def test_the_mask_of_a_token_is_no_token():
    """Catches an upload with the text <HUB_TOKEN> after a round trip."""
    args = TrainingArguments("out", hub_token="secret")
    assert TrainingArguments(**args.to_dict()).hub_token is None


def test_repr_names_class_and_every_field_in_order():
    text = repr(Seq2SeqTrainingArguments("out", learning_rate=1e-3))
    names = [line.split("=")[0] for line in text.splitlines()[1:-1]]
    assert text.startswith("Seq2SeqTrainingArguments(\n")
    assert names == sorted(f.name for f in dataclasses.fields(Seq2SeqTrainingArguments))
    assert "\nlearning_rate=0.001,\n" in text


@pytest.mark.parametrize(
    "cls",
    [TrainingArguments, Seq2SeqTrainingArguments, SentenceTransformerTrainingArguments, WithToken],
)
def test_a_round_trip_gives_the_same_arguments(cls):
    args = cls(
        "out", eval_strategy="steps", use_cpu=True, lr_scheduler_kwargs={"min_lr": 1e-6},
        accelerator_config={"split_batches": False}, deepspeed={"bf16": {"enabled": "auto"}},
        report_to="none", save_strategy="no", zero_stage=3,
    )  # fmt: skip
    assert cls(**args.to_dict()) == args
    assert cls(**json.loads(args.to_json_string())) == args


def test_records_have_plain_values_of_libraries_objects():
    import torch
    from transformers import GenerationConfig

    args = Seq2SeqTrainingArguments("out")
    args.generation_config = GenerationConfig(max_new_tokens=5)
    args.run_name = torch.bfloat16  # type: ignore[assignment]
    values = args.to_dict()
    assert values["generation_config"]["max_new_tokens"] == 5
    assert values["run_name"] == "bfloat16"
