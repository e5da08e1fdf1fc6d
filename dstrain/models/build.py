"""Building and loading of language models, partitioned at stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.config.memory.model_spec import check_sizes, read_config_file, value_of
from dstrain.core.errors import ModelError, Problem, nearest
from dstrain.core.files import expanded, told_refused
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none, launched_ranks
from dstrain.models import compat
from dstrain.models.folder import check_loaded, check_model_folder, library_errors
from dstrain.models.partitioned import building_partitioned

logger = get_logger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_model_config(spec: str, **defaults: Any) -> Any:
    """Return a transformers config from a ``config.json``, its folder, or ``type:key=value,...``.

    Args:
        spec: such as "llama:hidden_size=256,num_hidden_layers=4", or a path.
        **defaults: values for keys that the short form does not give (vocabulary size, token ids).

    Raises:
        ModelError: the model type or a key is not known, the file cannot be read, or transformers
            refuses the values.
    """
    if _names_file(spec):
        return _read_config(expanded(spec))
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
    # gpt2 calls its length n_positions: a default must not replace a value of the user's for it.
    own_name = plain.attribute_map
    given = {own_name.get(k, k) for k in values}
    filled = {k: v for k, v in defaults.items() if k in known and own_name.get(k, k) not in given}
    return _make_config(kind, {**filled, **values}, spec)


def _names_file(spec: str) -> bool:
    """Tell whether a ``model_config`` is a path, as opposed to the short form."""
    try:
        return spec.endswith(".json") or expanded(spec).exists()
    except OSError:  # a short form that is too long for a file name
        return False


def build_causal_lm(config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """Return a causal language model with new weights, in the number format of the run."""
    from transformers import AutoModelForCausalLM

    return _build(AutoModelForCausalLM, config, resolved)


def build_seq2seq(config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """Return a sequence-to-sequence model with new weights, in the number format of the run."""
    from transformers import AutoModelForSeq2SeqLM

    return _build(AutoModelForSeq2SeqLM, config, resolved)


def load_causal_lm(
    folder: str, resolved: ResolvedConfig, *, ignore_missing: bool = False
) -> torch.nn.Module:
    """Return a causal language model with the weights of a folder or hub model; a collective.

    Raises:
        ModelError: as ``_load``.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, resolved, ignore_missing=ignore_missing)


def load_seq2seq(
    folder: str, resolved: ResolvedConfig, *, ignore_missing: bool = False
) -> torch.nn.Module:
    """Return a sequence-to-sequence model with weights of a folder or hub model; a collective.

    Raises:
        ModelError: as ``_load``.
    """
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, folder, resolved, ignore_missing=ignore_missing)


def _build(auto: Any, config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """Return a model with new weights, of the class that an auto class chooses for a config."""
    with (
        library_errors(f"no {config.model_type} model can be built from the model config"),
        building_partitioned(resolved),
    ):
        return auto.from_config(config, dtype=DTYPES[resolved.precision])


def _load(
    auto: Any, folder: str, resolved: ResolvedConfig, *, ignore_missing: bool
) -> torch.nn.Module:
    """Load a model, and check that every weight of its class was loaded; a collective.

    Args:
        auto: auto class of transformers.
        folder: folder, or name of a hub model.
        resolved: the config of the run.
        ignore_missing: whether to initialise missing weights randomly instead of an error.

    Raises:
        ModelError: the folder has no weights, transformers cannot load it, weights have another
            shape, or weights are missing; raised on every rank.
    """
    with all_or_none():
        check_model_folder(folder)
    with all_or_none():
        with (
            library_errors(f"model_name_or_path={folder!r} cannot be loaded"),
            building_partitioned(resolved),
            compat.without_load_report(),
        ):
            # Weights of another shape are reported by check_loaded, with all other problems.
            model, info = auto.from_pretrained(
                folder,
                dtype=DTYPES[resolved.precision],
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        missing = check_loaded(info, folder, ignore_missing=ignore_missing)
    _log_loaded(folder, missing, sorted(info["unexpected_keys"]))
    return model


def _log_loaded(folder: str, missing: list[str], unused: list[str]) -> None:
    """Log, on the main rank, which weights were missing and which were not used."""
    for names, what in ((missing, "are missing, and random"), (unused, "are not used")):
        if names and launched_ranks().is_main:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            logger.warning("weights of %s %s: %s%s", folder, what, ", ".join(names[:3]), more)


def max_length(config: Any) -> int | None:
    """Return the length of the longest sequence that a config allows; None without a limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@told_refused(ModelError)
def _read_config(path: Path) -> Any:
    """Return the config in a file ``config.json``, or in a folder with one."""
    file = path / "config.json" if path.is_dir() else path
    content = read_config_file(file, str(path))
    kind = content.pop("model_type", None)
    if not isinstance(kind, str):
        raise ModelError(Problem(f"model_config={str(path)!r}", "it has no model_type"))
    return _make_config(kind, content, str(path))


def _make_config(kind: str, values: dict[str, Any], spec: str) -> Any:
    """Return a config of a model type with given values.

    Raises:
        ModelError: the type is not known, or transformers refuses the values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        raise _unknown_type(kind)
    check_sizes(values, spec)
    with library_errors(f"model_config={spec!r}: transformers refuses its values"):
        return AutoConfig.for_model(kind, **values)


def _parse_pairs(text: str, spec: str) -> dict[str, Any]:
    """Return the values of ``key=value,...``, which is a part of ``spec``."""
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
        values[key] = value_of(value)
    return values


def _unknown_type(kind: str) -> ModelError:
    """Return the error for a model type that transformers does not have."""
    from transformers import CONFIG_MAPPING

    close = nearest(kind, set(CONFIG_MAPPING.keys()))
    return ModelError(
        Problem(
            f"model type {kind!r}",
            "transformers knows no such model type, and there is no file of that name",
            f"did you mean {close!r}?" if close else "give a config.json, or llama:key=value,...",
        )
    )
