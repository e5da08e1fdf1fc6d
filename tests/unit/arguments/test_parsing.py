"""Arguments from command lines, JSON and YAML, and values of arguments for embeddings."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

import pytest

from dstrain.arguments import (
    SentenceTransformerTrainingArguments,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)
from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import NOT_YET
from dstrain.core.errors import ConfigError


@pytest.fixture
def unpended(monkeypatch):
    """Let the embedding arguments be as if the trainer had them."""
    from dstrain.arguments import enforce

    monkeypatch.setattr(enforce, "refusals", lambda arguments: [])
    return SentenceTransformerTrainingArguments


def test_prompts_are_text_or_a_dict(unpended):
    assert unpended(prompts="query: ").prompts == "query: "
    assert unpended(prompts='{"query": "q: "}').prompts == {"query": "q: "}
    assert unpended(prompts='{"a": {"query": "1"}}').prompts == {"a": {"query": "1"}}, (
        "not a number"
    )


@pytest.mark.parametrize("name", ["router_mapping", "learning_rate_mapping"])
def test_mappings_are_a_dict_or_its_json(unpended, name):
    assert getattr(unpended(**{name: '{"a": 0.5}'}), name) == {"a": 0.5}
    assert getattr(unpended(**{name: None}), name) == {}
    with pytest.raises(ConfigError, match="expected a JSON object"):
        unpended(**{name: "text"})


def test_samplers_are_names_enums_classes_or_functions(unpended):
    class Samplers(enum.StrEnum):
        NO_DUPLICATES = "no_duplicates"

    assert unpended(batch_sampler=Samplers.NO_DUPLICATES).batch_sampler == "no_duplicates"
    args = unpended(batch_sampler=dict, multi_dataset_batch_sampler=lambda **_: None)
    assert args.batch_sampler is dict
    assert "batch_sampler" not in args.to_dict()
    assert "multi_dataset_batch_sampler" not in args.to_dict()
    with pytest.raises(ConfigError, match="did you mean 'no_duplicates'"):
        unpended(batch_sampler="no_duplicate")


def test_embedding_arguments_are_not_silently_ignored():
    with pytest.raises(ConfigError, match=NOT_YET):
        SentenceTransformerTrainingArguments(prompts="query: ")


FLAGS = [
    *("--output_dir", "out", "--save_strategy", "no", "--learning_rate", "1e-3", "--bf16"),
    *("--accelerator_config", '{"split_batches": "false"}', "--remove_unused_columns", "False"),
    *("--lr_scheduler_kwargs", '{"min_lr": "1e-6"}', "--max_steps", "7"),
]
VALUES: dict[str, Any] = {
    "output_dir": "out", "save_strategy": "no", "learning_rate": 1e-3, "bf16": True,
    "accelerator_config": {"split_batches": False}, "remove_unused_columns": False,
    "lr_scheduler_kwargs": {"min_lr": 1e-6}, "max_steps": 7,
}  # fmt: skip


@dataclass
class Extended(Seq2SeqTrainingArguments):
    """Arguments of a user's script."""

    temperature: float = arg(0.5, "Ours.")
    stages: list[str] | None = None


@pytest.mark.parametrize(
    "cls",
    [
        TrainingArguments,
        Seq2SeqTrainingArguments,
        SentenceTransformerTrainingArguments,
        Extended,
    ],
)
def test_hf_argument_parser_reads_command_line_json_and_yaml(cls, tmp_path):
    from transformers import HfArgumentParser

    parser = HfArgumentParser(cls)
    assert parser.parse_args_into_dataclasses([])[0] == cls()
    (args,) = parser.parse_args_into_dataclasses(FLAGS)
    assert args == cls(**VALUES)
    json_file, yaml_file = tmp_path / "a.json", tmp_path / "a.yaml"
    json_file.write_text(json.dumps({**VALUES, "learning_rate": "1e-3", "bf16": "true"}))
    # YAML reads 1e-3 as text: a dot is missing.
    yaml_file.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in VALUES.items()).replace(
        "0.001", "1e-3"))  # fmt: skip
    assert parser.parse_json_file(str(json_file))[0] == cls(**VALUES)
    assert parser.parse_yaml_file(str(yaml_file))[0] == cls(**VALUES)


def test_hf_argument_parser_shows_its_help():
    """A ``%`` in a meaning would break ``--help`` of every script."""
    from transformers import HfArgumentParser

    for cls in (Extended, SentenceTransformerTrainingArguments):
        assert "--nan_loss" in HfArgumentParser(cls).format_help()


@pytest.mark.parametrize("cls", [Extended, SentenceTransformerTrainingArguments])
def test_our_parser_reads_them_too(cls):
    from dstrain.cli.flags import make_parser, parse

    parser = make_parser("prog", "", [cls])
    assert parse(parser, [], [cls])[1] == [cls()]
    assert parse(parser, FLAGS, [cls])[1] == [cls(**VALUES)]
    text = " ".join(parser.format_help().split())
    assert "(deprecated) (default: False)" in text
    assert "(refused here)" in text
