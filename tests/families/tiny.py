"""Shrink the config of any transformers model, and go over every class of an Auto mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from tests.families.sizes import (
    CORRECTIONS,
    OFF,
    OFF_NAMES,
    SIZES,
    SPECIAL_IDS,
    STAGES,
    VOCAB,
)

SEED = 1234
MODALITY_IDS = range(VOCAB - 1, 60, -1)  # ids of image, video and audio tokens; text stays below
TEXT_IDS = 60


def tiny_config(kind: type[PreTrainedConfig] | str, **overrides: Any) -> PreTrainedConfig:
    """Return a config of class or model type ``kind`` with tiny sizes and nothing random.

    Configs of parts (text, vision, audio) shrink alike, so that their widths stay equal where the
    model asks for that. ``overrides`` win over everything else.
    """
    config_class = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    return _tiny(config_class, {}, overrides)


def config_of(
    model_class: type[PreTrainedModel], model_type: str | None = None, **overrides: Any
) -> PreTrainedConfig:
    """Return the tiny config for ``model_class``, as a model of ``model_type`` if it has several.

    An Auto mapping may name a model of many parts for a class that is one of the parts: there the
    class's own config counts.
    """
    own = model_class.config_class
    named = CONFIG_MAPPING[model_type] if model_type else own
    return tiny_config(named if own is None or issubclass(named, own) else own, **overrides)


def build(
    model_class: type[PreTrainedModel], model_type: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """Build a tiny ``model_class`` with the same fp32 weights at every call."""
    config = config_of(model_class, model_type, **overrides)
    return without_randomness(seeded(lambda: model_class(config)))


def seeded(make: Any, *, seed: int = SEED) -> Any:
    """Call ``make`` under a fixed seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def tiny_models(auto_mapping_name: str) -> Iterator[tuple[str, type[PreTrainedModel]]]:
    """Yield (model type, class) of an Auto mapping, such as ``MODEL_FOR_CAUSAL_LM_MAPPING``.

    A class comes once for each of its model types, and only if it builds from a tiny config here.
    """
    for model_type, model_class in mapped(auto_mapping_name):
        if model_type not in DOES_NOT_BUILD:
            yield model_type, model_class


def mapped(auto_mapping_name: str) -> Iterator[tuple[str, type[PreTrainedModel]]]:
    """Yield every (model type, class) of an Auto mapping, whether or not it builds here."""
    import transformers
    from transformers.models.auto import modeling_auto

    for model_type, names in getattr(modeling_auto, f"{auto_mapping_name}_NAMES").items():
        for name in (names,) if isinstance(names, str) else names:
            yield model_type, getattr(transformers, name)


def _tiny(
    config_class: type[PreTrainedConfig], base: dict[str, Any], overrides: dict[str, Any]
) -> PreTrainedConfig:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        default = base.get(field.name, _default(field))
        if (value := _shrunk(field.name, default)) is not None:
            values[field.name] = value
        elif field.name in base:
            values[field.name] = default
    values |= _token_ids(config_class, base)
    corrections = dict(CORRECTIONS.get(config_class.model_type, {}))
    for name, spec in config_class.sub_configs_defaults.items():
        given = overrides.get(name, corrections.get(name))
        if isinstance(given, PreTrainedConfig):
            continue
        given = dict(given or {})
        part_class: Any = spec.config_class
        model_type = given.pop("model_type", None)
        if model_type or not issubclass(part_class, PreTrainedConfig):
            part_class = CONFIG_MAPPING[model_type or spec.model_type]
        values[name] = _tiny(part_class, {} if model_type else dict(spec.init_kwargs), given)
        corrections.pop(name, None)
        overrides = {k: v for k, v in overrides.items() if k != name}
    return config_class(**values | corrections | overrides)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shrunk(name: str, default: Any) -> Any:
    """Return the tiny value of a field; None to leave it at its default."""
    if isinstance(default, bool):
        return None
    if name in OFF_NAMES or any(name.endswith(end) for end in OFF):
        return _like(default, 0.0) if default is not None else None
    if isinstance(default, (list, tuple)):
        if name in STAGES and default and isinstance(default[0], int):
            return type(default)(STAGES[name][: len(default)])
        if name in SIZES and default and isinstance(default[0], int):
            return type(default)([SIZES[name]] * len(default))
        return None
    if name in SIZES:
        return _like(default, SIZES[name])
    return None


def _like(default: Any, value: Any) -> Any:
    if isinstance(default, (list, tuple)):
        return type(default)(type(v)(value) for v in default)
    return type(default)(value) if isinstance(default, (int, float)) else value


def _token_ids(config_class: type[PreTrainedConfig], base: dict[str, Any]) -> dict[str, Any]:
    """Return ids of special tokens below the tiny vocabulary: one for each name."""
    found: dict[str, Any] = {}
    free = iter(MODALITY_IDS)
    for field in dataclasses.fields(config_class):
        name, default = field.name, base.get(field.name, _default(field))
        if not name.endswith(("_id", "_token_index", "_token_ids")):
            continue
        kind = name.split("_")[0]
        if kind in SPECIAL_IDS and "token" in name:
            ids = default if isinstance(default, (list, tuple)) else [default]
            if default is None or any(i is None or not 0 <= i < TEXT_IDS for i in ids):
                found[name] = SPECIAL_IDS[kind]
        elif isinstance(default, (list, tuple)):
            found[name] = type(default)(next(free) for _ in default)
        elif isinstance(default, int) and default >= VOCAB:
            found[name] = next(free)
    return found


def without_randomness(model: nn.Module) -> nn.Module:
    """Turn off what is random in training mode whatever the config says."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
    return model


# Model types of the six Auto mappings without a tiny model in transformers 5.24, and why.
DOES_NOT_BUILD: dict[str, str] = {
    "apertus1p5": "its ids of image and audio tokens begin where fixed ranges of ids end",
    "dbrx": "the model reads attn_config.rope_theta, which its own config does not have",
    "dinat": "needs natten",
    "evolla": "its compressor has fixed sizes of 676 million parameters",
    "fast_vlm": "needs timm",
    "gemma3n": "needs timm",
    "gemma4_assistant": "shares the keys and values of another model",
    "gemma4_unified_assistant": "shares the keys and values of another model",
    "inkling_mm_model": "needs scipy",
    "layoutlmv2": "needs detectron2",
    "nemo_speechlm": "head and audio tower are tied by sizes that have no common tiny value",
    "nemotron_h_omni": "asks its audio config for fields that it does not have",
    "perceiver": "its image models have fixed sizes of 700 thousand parameters",
    "perception_lm": "needs timm",
    "timm_wrapper": "needs timm",
}
