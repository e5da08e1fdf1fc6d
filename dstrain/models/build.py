"""Building language models from a specification or a folder, partitioned at stage 3."""

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
        spec: such as "llama:hidden_size=256,num_hidden_layers=4" or a path.
        **defaults: values for keys that the short form leaves out (vocabulary size, token ids).

    Raises:
        ModelError: an unknown model type or key (with the nearest name), an unreadable file, values
            that transformers refuses.
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
    # gpt2 calls its length n_positions: a default must not beat what the user said in that name.
    own_name = plain.attribute_map
    given = {own_name.get(k, k) for k in values}
    filled = {k: v for k, v in defaults.items() if k in known and own_name.get(k, k) not in given}
    return _make_config(kind, {**filled, **values}, spec)


def _names_file(spec: str) -> bool:
    """Tell whether a ``model_config`` is a path and not the short form."""
    try:
        return spec.endswith(".json") or expanded(spec).exists()
    except OSError:  # a short form longer than a file name may be
        return False


def build_causal_lm(config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """Return a causal language model with fresh weights, in the number format of the engine."""
    from transformers import AutoModelForCausalLM

    return _build(AutoModelForCausalLM, config, resolved)


def build_seq2seq(config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    """Return a sequence-to-sequence model with fresh weights, in the engine's number format."""
    from transformers import AutoModelForSeq2SeqLM

    return _build(AutoModelForSeq2SeqLM, config, resolved)


def load_causal_lm(
    folder: str, resolved: ResolvedConfig, *, ignore_missing: bool = False
) -> torch.nn.Module:
    """Return a causal language model with a folder's or hub model's weights; a collective.

    Raises:
        ModelError: as ``_load``.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, resolved, ignore_missing=ignore_missing)


def load_seq2seq(
    folder: str, resolved: ResolvedConfig, *, ignore_missing: bool = False
) -> torch.nn.Module:
    """Return a sequence-to-sequence model with a folder's or hub model's weights; a collective.

    Raises:
        ModelError: as ``_load``.
    """
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, folder, resolved, ignore_missing=ignore_missing)


def _build(auto: Any, config: Any, resolved: ResolvedConfig) -> torch.nn.Module:
    with (
        library_errors(f"no {config.model_type} model can be built from the model config"),
        building_partitioned(resolved),
    ):
        return auto.from_config(config, dtype=DTYPES[resolved.precision])


def _load(
    auto: Any, folder: str, resolved: ResolvedConfig, *, ignore_missing: bool
) -> torch.nn.Module:
    """Load a model, and check that it got every weight that its class needs, in its shape.

    Raises:
        ModelError: on all ranks alike: the folder has no weights, transformers cannot load it, or
            weights are missing (unless that is to be ignored) or of another shape.
    """
    with all_or_none():
        check_model_folder(folder)
    with all_or_none():
        with (
            library_errors(f"model_name_or_path={folder!r} cannot be loaded"),
            building_partitioned(resolved),
            compat.without_load_report(),
        ):
            # What does not fit is told in one error, and not in a table before a shorter one.
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
    for names, what in ((missing, "are missing, and random"), (unused, "are not used")):
        if names and launched_ranks().is_main:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            logger.warning("weights of %s %s: %s%s", folder, what, ", ".join(names[:3]), more)


def max_length(config: Any) -> int | None:
    """Return the longest sequence a model takes by its config; None when it sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@told_refused(ModelError)
def _read_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    content = read_config_file(file, str(path))
    kind = content.pop("model_type", None)
    if not isinstance(kind, str):
        raise ModelError(Problem(f"model_config={str(path)!r}", "it has no model_type"))
    return _make_config(kind, content, str(path))


def _make_config(kind: str, values: dict[str, Any], spec: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        raise _unknown_type(kind)
    check_sizes(values, spec)
    with library_errors(f"model_config={spec!r}: transformers refuses its values"):
        return AutoConfig.for_model(kind, **values)


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
        values[key] = value_of(value)
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
