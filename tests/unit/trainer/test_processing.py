"""Special tokens of model and tokenizer, and the processors that are saved with a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from dstrain.tasks.causal_lm.chat import DEFAULT_TEMPLATE, ChatEncoder
from dstrain.trainer.processing import align_special_tokens, processor_writer, stop_at
from tests.models import tiny_llama

WORDS = ["<pad>", "<s>", "</s>", "<|im_end|>", "a", "b", "user", "assistant", "\n"]
CHATML = (
    "{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def tokenizer(**special: str) -> Any:
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(WORDS)}, []))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return made


def test_the_tokens_of_the_tokenizer_are_those_of_the_model():
    """transformers' own function says what is right."""
    from transformers.trainer_utils import align_special_tokens as of_transformers

    given = tokenizer(eos_token="<|im_end|>", pad_token="<pad>", bos_token="b")
    for before in (2, [2, 7], [3, 2], None):
        ours, theirs = tiny_llama(), tiny_llama()
        for model in (ours, theirs):
            model.config.eos_token_id = before
            model.generation_config.eos_token_id = before
        align_special_tokens(ours, given)
        of_transformers(theirs, given)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            found = getattr(ours.generation_config, name)
            expected = getattr(theirs.generation_config, name)
            listed = [v if isinstance(v, list) else [v] for v in (found, expected)]
            assert listed[0] == listed[1]
            assert getattr(ours.config, name) == getattr(theirs.config, name)
        assert align_special_tokens(ours, given) == {}


def test_a_token_that_the_tokenizer_does_not_have_changes_nothing():
    model = tiny_llama()
    assert align_special_tokens(model, tokenizer(eos_token="</s>")) == {}
    assert (model.config.bos_token_id, model.config.pad_token_id) == (1, 0)


def test_a_processor_speaks_through_its_tokenizer():
    model = tiny_llama()
    processor = SimpleNamespace(tokenizer=tokenizer(eos_token="<|im_end|>"))
    assert align_special_tokens(model, processor) == {"eos_token_id": 3}
    assert model.config.eos_token_id == 3
    assert model.generation_config.eos_token_id == [3, 2]


@pytest.mark.parametrize("processing_class", [None, SimpleNamespace(), object()])
def test_models_without_a_tokenizer_are_left_alone(processing_class):
    assert align_special_tokens(tiny_llama(), processing_class) == {}
    assert align_special_tokens(nn.Linear(1, 1), tokenizer(eos_token="<|im_end|>")) == {}


def test_generation_stops_where_a_template_ends_an_answer():
    """The EOS token of a base model is another one than the end of a turn."""
    given = tokenizer(eos_token="</s>")
    given.chat_template = CHATML
    token = ChatEncoder(given).end_of_answer()
    assert token == 3
    model = tiny_llama()
    assert stop_at(model, token)
    assert model.generation_config.eos_token_id == [3, 2]
    assert not stop_at(model, token)
    given.chat_template = DEFAULT_TEMPLATE
    assert ChatEncoder(given).end_of_answer() == 2


def test_what_a_collator_works_with_is_saved_where_there_is_no_processing_class(tmp_path: Path):
    class Saves:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: Path) -> None:
            (folder / self.name).touch()

    collate = SimpleNamespace(tokenizer=Saves("tokenizer"), feature_extractor=Saves("extractor"))
    write = processor_writer(None, collate)
    assert write is not None
    write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["extractor", "tokenizer"]
    own = processor_writer(Saves("own"), collate)
    assert own is not None
    (tmp_path / "2").mkdir()
    own(tmp_path / "2")
    assert [p.name for p in (tmp_path / "2").iterdir()] == ["own"]
    assert processor_writer(None, SimpleNamespace(tokenizer=None)) is None
    assert processor_writer(object(), collate) is None
