"""Reading a model config that a user names, without transformers, and checking its sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.core.errors import ModelError, Problem
from dstrain.core.files import expanded, told_refused

# Sizes that every model has, and sizes that are 0 in some models for "none".
_POSITIVE = frozenset(
    {
        *("hidden_size", "d_model", "n_embd", "vocab_size", "num_hidden_layers", "num_layers"),
        *("n_layer", "num_attention_heads", "num_heads", "n_head"),
    }
)
_NOT_NEGATIVE = frozenset(
    {
        *("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_layers", "decoder_layers"),
        *("num_decoder_layers", "num_key_value_heads", "encoder_ffn_dim", "decoder_ffn_dim"),
        *("encoder_attention_heads", "decoder_attention_heads", "moe_intermediate_size"),
        *("head_dim", "d_kv"),
        *("num_experts", "num_local_experts", "num_experts_per_tok", "type_vocab_size"),
    }
)
# No machine builds a model with more layers in a day; real models have fewer than 1,000.
_MOST_LAYERS = 100_000
_LAYERS = frozenset(
    {
        *("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"),
        *("num_decoder_layers", "num_attention_heads", "num_heads", "n_head"),
        *("num_experts", "num_local_experts"),
    }
)
# Endings of the names of probabilities.
_SHARES = ("dropout", "_pdrop", "dropout_prob", "dropout_rate", "layerdrop", "drop_path_rate")


@told_refused(ModelError)
def read_spec(spec: str) -> tuple[dict[str, Any], bool]:
    """Read a model config: ``type:key=value,...``, a config.json, or a folder with one.

    Returns:
        values of the config with ``model_type``, and whether it was in the short form.

    Raises:
        ModelError: the file cannot be read, names no model type, or has an impossible size.
    """
    path = expanded(spec)
    if not (spec.endswith(".json") or _exists(path)):
        kind, _, rest = spec.partition(":")
        pairs = [pair.partition("=") for pair in filter(None, map(str.strip, rest.split(",")))]
        values = {"model_type": kind} | {k.strip(): value_of(v.strip()) for k, _, v in pairs}
        check_sizes(values, spec)
        return values, True
    content = read_config_file(path / "config.json" if path.is_dir() else path, spec)
    if not isinstance(content.get("model_type"), str):
        raise ModelError(Problem(f"model_config={spec!r}", "it has no model_type"))
    check_sizes(content, spec)
    return content, False


def read_config_file(file: Path, name: str) -> dict[str, Any]:
    """Read the object in a ``config.json``.

    Args:
        file: the file.
        name: name of the config in errors.

    Raises:
        ModelError: the file cannot be read, is no JSON object, or is nested too deep.
    """
    from dstrain.core.documents import loaded, parsed

    try:
        content = parsed(loaded(file))
    except (OSError, ValueError) as error:
        why = f"{file.name}: {error}" if isinstance(error, ValueError) else str(error)
        raise ModelError(Problem(f"the model config {name!r} cannot be read", why)) from error
    if not isinstance(content, dict):
        raise ModelError(
            Problem(f"the model config {name!r}", "it is no JSON object, so it has no model_type")
        )
    return content


def value_of(text: str) -> Any:
    """Return the value of a ``key=value`` in the short form: parsed if it is JSON, else text."""
    from dstrain.core.documents import parsed

    # Spellings of Python -> spellings of JSON.
    word = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        return parsed(word.encode())
    except ValueError:
        return text


def check_sizes(values: Mapping[str, Any], name: str) -> None:
    """Refuse sizes and dropouts that no model can have: texts, fractions, negative or huge numbers.

    Args:
        values: values of the config.
        name: name of the config in errors.

    Raises:
        ModelError: some are; the error lists all of them.
    """
    problems = [
        Problem(
            f"{key}={json.dumps(value, default=str)} in the model config {name!r}",
            why,
            "correct it, or give the config.json that the weights were saved with",
        )
        for key, value, why in _wrong_sizes(values)
    ]
    if problems:
        raise ModelError(problems)


def _wrong_sizes(values: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield dotted key, value and reason of each impossible size in a config."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if str(key).endswith("config"):  # such as text_config and vision_config
                yield from _wrong_sizes(value, f"{inside}{key}.")
            continue
        if str(key).endswith(_SHARES) and not _are_shares(value):
            yield f"{inside}{key}", value, "a number from 0 to 1 is needed"
        if key not in _POSITIVE | _NOT_NEGATIVE or value is None:
            continue
        least = 1 if key in _POSITIVE and not inside else 0
        parts = value if isinstance(value, list) and value else [value]  # a layer or stage each
        if not all(_is_whole(part) and part >= least for part in parts):
            yield f"{inside}{key}", value, f"a whole number of {least} or more is needed"
        elif key in _LAYERS and any(part > _MOST_LAYERS for part in parts):
            yield f"{inside}{key}", value, f"no model has more than {_MOST_LAYERS:,} of them"


def _are_shares(value: Any) -> bool:
    """Tell whether a value, or each value of a list, is a probability, a flag or None."""
    parts = value if isinstance(value, list) else [value]
    return all(
        part is None
        or isinstance(part, bool)
        or (isinstance(part, (int, float)) and 0 <= part <= 1)
        for part in parts
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a short form longer than a file name may be
        return False
