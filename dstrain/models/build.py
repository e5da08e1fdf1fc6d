"""Building language models from a specification or a folder, partitioned at stage 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ModelError, Problem, nearest
from dstrain.models.compat import StrictDataclassError
from dstrain.models.partitioned import building_partitioned

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_model_config(spec: str, **defaults: Any) -> Any:
    """A transformers config from ``config.json``, a folder with one, or ``type:key=value,...``.

    Args:
        spec: such as "llama:hidden_size=256,num_hidden_layers=4" or a path.
        **defaults: values for keys that the short form leaves out (vocabulary size, token ids).

    Raises:
        ModelError: an unknown model type or key (with the nearest name), an unreadable file, values
            that transformers refuses.
    """
    if _names_file(spec):
        return _read_config(Path(spec).expanduser())
    kind, _, rest = spec.partition(":")
    values = _parse_pairs(rest, spec)
    plain = _make_config(kind, {}, spec)
    known = set(plain.to_dict()) | set(vars(plain)) | set(plain.attribute_map)
    unknown = [k for k in values if k not in known]
    if unknown:
        raise ModelError(
            [
                Problem(
                    f"model_config key {name!r}",
                    f"a {kind} config has no such key",
                    f"did you mean {close!r}?" if (close := nearest(name, known)) else "",
                )
                for name in unknown
            ]
        )
    # gpt2 calls its length n_positions: a default must not beat what the user said in that name.
    own_name = plain.attribute_map
    given = {own_name.get(k, k) for k in values}
    filled = {k: v for k, v in defaults.items() if k in known and own_name.get(k, k) not in given}
    return _make_config(kind, {**filled, **values}, spec)


def _names_file(spec: str) -> bool:
    """Whether a ``model_config`` is a path and not the short form."""
    try:
        return spec.endswith(".json") or Path(spec).expanduser().exists()
    except OSError:  # a short form longer than a file name may be
        return False


def build_causal_lm(config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """A causal language model with fresh weights, in the format that the engine trains in."""
    from transformers import AutoModelForCausalLM

    return _build(AutoModelForCausalLM, config, resolved)


def build_seq2seq(config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """A sequence-to-sequence model with fresh weights, in the format that the engine trains in."""
    from transformers import AutoModelForSeq2SeqLM

    return _build(AutoModelForSeq2SeqLM, config, resolved)


def load_causal_lm(folder: str, resolved: ResolvedConfig) -> torch.nn.Module:
    """A causal language model with the weights of a folder or hub model.

    Raises:
        ModelError: the folder has no weights, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, resolved)


def load_seq2seq(folder: str, resolved: ResolvedConfig) -> torch.nn.Module:
    """A sequence-to-sequence model with the weights of a folder or hub model.

    Raises:
        ModelError: the folder has no weights, or transformers cannot load it.
    """
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, folder, resolved)


def _build(auto: Any, config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    with building_partitioned(resolved):
        return auto.from_config(config, dtype=DTYPES[resolved.precision])


def _load(auto: Any, folder: str, resolved: ResolvedConfig) -> torch.nn.Module:
    check_model_folder(folder)
    try:
        with building_partitioned(resolved):
            return auto.from_pretrained(folder, dtype=DTYPES[resolved.precision])
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            Problem(f"model_name_or_path={folder!r} cannot be loaded", str(error).strip())
        ) from error


def check_model_folder(folder: str) -> None:
    """Find out before anything expensive that a local folder is no model.

    Raises:
        ModelError: no config.json, or no weights beside it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        if path.is_absolute() or folder.startswith((".", "~")):
            raise ModelError(Problem(f"model_name_or_path={folder!r}", "there is no such folder"))
        return
    found = sorted(p.name for p in path.iterdir())
    listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    problems = []
    if "config.json" not in found:
        problems.append(
            Problem(f"model folder {folder!r} has no config.json", f"it holds {listing}")
        )
    if not any(n.endswith((".safetensors", ".bin")) for n in found):
        problems.append(
            Problem(
                f"model folder {folder!r} has no weights",
                f"no *.safetensors or *.bin file; it holds {listing}",
                "give a folder written by save_pretrained, or start fresh with --model_config",
            )
        )
    if problems:
        raise ModelError(problems)


def max_length(config: Any) -> int | None:
    """The longest sequence a model takes by its config; None when it sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _read_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            Problem(f"model_config={str(path)!r} cannot be read", str(error))
        ) from error
    kind = content.pop("model_type", None) if isinstance(content, dict) else None
    if kind is None:
        raise ModelError(Problem(f"model_config={str(path)!r}", "it has no model_type"))
    return _make_config(kind, content, str(path))


def _make_config(kind: str, values: dict[str, Any], spec: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        raise _unknown_type(kind)
    try:
        return AutoConfig.for_model(kind, **values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ModelError(
            Problem(f"model_config={spec!r}", f"transformers refuses its values: {error}")
        ) from error


def _parse_pairs(text: str, spec: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ModelError(
                Problem(
                    f"model_config={spec!r}",
                    f"{pair!r} is no key=value pair",
                    "llama:key=value,...",
                )
            )
        key, value = key.strip(), value.strip()
        if key in values:
            raise ModelError(
                Problem(f"model_config={spec!r}", f"{key!r} stands twice in it", "keep one of them")
            )
        # Python's spelling of three values that JSON spells in another way.
        word = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            values[key] = json.loads(word)
        except ValueError:
            values[key] = value
    return values


def _unknown_type(kind: str) -> ModelError:
    from transformers import CONFIG_MAPPING

    close = nearest(kind, set(CONFIG_MAPPING.keys()))
    return ModelError(
        Problem(
            f"model type {kind!r}",
            "transformers knows no such model type, and there is no file of that name",
            f"did you mean {close!r}?" if close else "give a config.json, or llama:key=value,...",
        )
    )
