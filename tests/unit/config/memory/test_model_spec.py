"""A model from scratch is written as a short form or a file; both are checked before they cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, resolve
from dstrain.config.memory.model_spec import check_sizes, read_spec
from dstrain.core.errors import ModelError
from dstrain.models import build_causal_lm, check_model_folder, max_length, parse_model_config

TINY = "llama:hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2"


def refusal(spec: str, **defaults: Any) -> str:
    """Return the message for a specification that cannot be used."""
    with pytest.raises(ModelError) as caught:
        parse_model_config(spec, **defaults)
    return str(caught.value)


# --- the short form ------------------------------------------------------------------------------


def test_the_short_form_sets_what_it_names_and_leaves_the_rest():
    config = parse_model_config(TINY)
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers) == (32, 1)
    assert config.vocab_size == parse_model_config("llama").vocab_size


@pytest.mark.parametrize(
    ("written", "key", "expected"),
    [
        ("tie_word_embeddings=true", "tie_word_embeddings", True),
        ("tie_word_embeddings=False", "tie_word_embeddings", False),
        ("rms_norm_eps=1e-5", "rms_norm_eps", 1e-5),
        ("hidden_act=gelu", "hidden_act", "gelu"),
        ('hidden_act="gelu"', "hidden_act", "gelu"),
        ("pad_token_id=null", "pad_token_id", None),
        ("bos_token_id=None", "bos_token_id", None),
        (" hidden_size = 64 ", "hidden_size", 64),
        ("hidden_size=64,", "hidden_size", 64),
        ("tie_word_embeddings= True", "tie_word_embeddings", True),
    ],
)
def test_values_have_the_type_they_are_written_in(written, key, expected):
    """ "false" as a text would be true."""
    value = getattr(parse_model_config(f"llama:{written}"), key)
    assert value == expected
    assert type(value) is type(expected)


def test_defaults_fill_what_the_short_form_leaves_out_and_no_more():
    """The vocabulary comes from the tokenizer unless the user wrote one."""
    config = parse_model_config("llama:vocab_size=50", vocab_size=99, eos_token_id=7, nonsense=1)
    assert (config.vocab_size, config.eos_token_id) == (50, 7)
    assert not hasattr(config, "nonsense")


def test_a_default_does_not_beat_what_the_user_said_in_the_models_own_name():
    """GPT-2 calls its length n_positions; the two would meet in one field."""
    config = parse_model_config("gpt2:n_positions=64", max_position_embeddings=2048)
    assert config.max_position_embeddings == 64
    assert parse_model_config("gpt2", max_position_embeddings=2048).n_positions == 2048


def test_common_names_are_understood_for_every_model_type():
    """GPT-2 calls the hidden size n_embd; transformers takes both."""
    assert parse_model_config("gpt2:hidden_size=48,num_attention_heads=4").n_embd == 48


def test_a_short_form_may_be_longer_than_a_file_name():
    """It was once asked of the file system, which refuses names above 255 bytes."""
    spec = f"{TINY}," + ",".join(
        f"{key}={value}"
        for key, value in {
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.0200000000000000000000001,
            "rms_norm_eps": 1e-5,
            "attention_dropout": 0.125,
            "tie_word_embeddings": "true",
            "attention_bias": "false",
            "mlp_bias": "false",
            "use_cache": "true",
            "head_dim": 16,
        }.items()
    )
    assert len(spec) > 255
    assert parse_model_config(spec).max_position_embeddings == 4096


def test_unknown_keys_are_refused_all_at_once_with_the_nearest():
    message = refusal("llama:hiden_size=64,num_layer=2,zzz=1")
    for expected in ("'hiden_size'", "did you mean 'hidden_size'?", "'num_layer'", "'zzz'"):
        assert expected in message


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lama:hidden_size=64", "did you mean 'llama'?"),
        ("zzzzzz:hidden_size=64", "give a config.json, or llama:key=value"),
        ("llama:hidden_size", "'hidden_size' is no key=value pair"),
        ("llama:hidden_size=64,hidden_size=128", "'hidden_size' stands twice"),
        ("llama:hidden_size=abc", "hidden_size"),
        ("llama:hidden_size=100,num_attention_heads=3", "not a multiple"),
    ],
)
def test_a_short_form_that_cannot_be_used_is_the_users_error(spec, expected):
    """And no traceback of transformers' validation."""
    message = refusal(spec)
    assert expected in message


# --- a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_config_file_or_its_folder_is_read(tmp_path, as_folder):
    parse_model_config(TINY).save_pretrained(tmp_path)
    config = parse_model_config(str(tmp_path if as_folder else tmp_path / "config.json"))
    assert config.to_dict() == parse_model_config(TINY).to_dict() | {
        "transformers_version": config.transformers_version
    }


def test_a_file_is_taken_as_it_is_without_defaults(tmp_path):
    parse_model_config(TINY).save_pretrained(tmp_path)
    assert parse_model_config(str(tmp_path), vocab_size=99).vocab_size != 99


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ([1], "it has no model_type"),
        ({"hidden_size": 64}, "it has no model_type"),
        ({"model_type": "lama"}, "did you mean 'llama'?"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}, "not a multiple"),
    ],
    ids=["broken", "no text", "list", "no type", "unknown type", "wrong type", "illegal pair"],
)
def test_a_file_that_cannot_be_used_is_the_users_error(tmp_path, content, expected):
    file = tmp_path / "config.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert expected in refusal(str(file))


def test_a_missing_file_is_named():
    assert "nowhere.json" in refusal("nowhere.json")


def test_a_folder_without_a_config_is_named(tmp_path):
    assert str(tmp_path) in refusal(str(tmp_path))


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("llama:max_position_embeddings=77", 77),
        ("gpt2:n_positions=55", 55),
        ("mamba", None),  # recurrent: no limit
        ("bloom", None),  # ALiBi: no limit
    ],
)
def test_max_length_is_what_the_config_says(spec, expected):
    assert max_length(parse_model_config(spec)) == expected


# --- model folders -------------------------------------------------------------------------------


def folder_refusal(folder: Any) -> list[str]:
    with pytest.raises(ModelError) as caught:
        check_model_folder(str(folder))
    return [str(problem) for problem in caught.value.problems]


def test_a_model_folder_without_config_and_weights_says_both(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    texts = folder_refusal(tmp_path)
    assert ["no config.json" in t for t in texts] == [True, False]
    assert ["no weights" in t for t in texts] == [False, True]
    assert all("tokenizer.json" in text for text in texts), "what it holds is shown"


def test_an_empty_folder_says_that_it_holds_nothing(tmp_path):
    assert all("it holds nothing" in text for text in folder_refusal(tmp_path))


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
def test_a_complete_folder_passes(tmp_path, shard_bytes):
    """In one file, or in several with an index."""
    config = parse_model_config(f"{TINY},vocab_size=16")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size=shard_bytes)
    check_model_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    assert "there is no such folder" in folder_refusal(name)[0]


def test_a_hub_name_passes_without_a_look_at_the_network():
    check_model_folder("meta-llama/Llama-3.2-1B")


# --- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_model_is_built_in_the_format_that_the_engine_trains_in(precision):
    """An fp32 copy first would double the memory of start-up; rotary buffers stay exact."""
    import torch

    flags = {precision: True} if precision != "fp32" else {}
    resolved = resolve(TrainingArguments(**flags), Facts(device="cpu"))
    model = build_causal_lm(parse_model_config(TINY, vocab_size=64), resolved)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in model.parameters()} == {expected}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32, "the global default was left as it was"


@pytest.mark.parametrize(
    "size", ["hidden_size=-8", "hidden_size=0", 'hidden_size="big"', "vocab_size=1.5"]
)
def test_sizes_that_can_be_none_are_refused_with_and_without_torch(size):
    """As a run, ``explain`` and ``plan`` read it."""
    spec = f"llama:{size}".replace('"', "")
    assert size in refusal(spec)
    with pytest.raises(ModelError, match=size):
        read_spec(spec)


def test_a_short_form_nested_too_deep_is_text():
    """Its parser would meet a RecursionError."""
    assert "rope_scaling" in refusal(f"llama:rope_scaling={'[' * 100_000}")


def test_every_default_config_of_transformers_has_possible_sizes():
    """Some have several, one for each layer or stage; some are 0 in a part of a model."""
    from transformers import CONFIG_MAPPING

    looked_at = 0
    for kind in CONFIG_MAPPING:
        try:
            values = CONFIG_MAPPING[kind]().to_dict()
        except Exception:  # noqa: S112 - of a package that is not installed, or without defaults
            continue
        check_sizes(values, kind)
        looked_at += 1
    assert looked_at > 500
