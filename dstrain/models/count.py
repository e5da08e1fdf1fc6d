"""A program that counts the parameters of any architecture of transformers, without their memory.

``python -m dstrain.models.count SPEC`` prints ``ModelSizes`` as JSON. The process that runs it need
not import torch itself.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch

from dstrain.config.memory.sizes import ModelSizes
from dstrain.core.errors import DstrainError, ModelError, Problem
from dstrain.models.build import parse_model_config
from dstrain.models.folder import library_errors
from dstrain.models.sizes import sizes_of_module


def count_parameters(spec: str) -> ModelSizes:
    """Return the sizes of the model that ``spec`` describes, by building it without memory.

    Args:
        spec: as for ``parse_model_config``.

    Raises:
        ModelError: the config cannot be read, or no model can be built from it.
    """
    config = parse_model_config(spec)
    with library_errors(
        f"no model of type {config.model_type!r} can be built from model_config={spec!r}",
        "install what it names as missing, or complete the config",
    ):
        module = _build(config)
    return sizes_of_module(module, source="built without memory")


def _build(config: Any) -> torch.nn.Module:
    """Build a model on the meta device.

    Its class is the one that the config names. Without a name, the classes that transformers has
    for the type of config are tried, those with a language-model head first.

    Raises:
        ModelError: transformers has no model class for the config.
    """
    import transformers

    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    autos = [transformers.AutoModelForCausalLM, transformers.AutoModel]
    if getattr(config, "is_encoder_decoder", False):
        autos.insert(0, transformers.AutoModelForSeq2SeqLM)
    elif getattr(config, "vision_config", None) is not None:
        autos.insert(0, transformers.AutoModelForImageTextToText)
    # Then all others: models for other tasks, backbones, parts of models.
    others = [n for n in sorted(dir(transformers)) if n.startswith("AutoModelFor")]
    autos += [getattr(transformers, name) for name in others]
    failure: Exception | None = None
    with torch.device("meta"):
        if named is not None:
            return named(config)
        for auto in autos:
            try:
                return auto.from_config(config)
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    failure = failure or error
        for cls in _classes_of(config):
            return cls(config)
    if failure is not None:
        raise failure
    raise ModelError(
        Problem(
            f"model type {config.model_type!r} cannot be built",
            "it is the config of a part: transformers has no model class that takes it alone",
            "give the config of the whole model",
        )
    )


def _classes_of(config: Any) -> list[Any]:
    """Return the model classes for this type of config, the one named after it first."""
    from transformers import PreTrainedModel

    module = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        members = vars(importlib.import_module(module)).values()
    except ImportError:
        return []
    kind = type(config)
    found = [
        m
        for m in members
        if isinstance(m, type)
        and issubclass(m, PreTrainedModel)
        and getattr(m, "config_class", None) is kind
        and not m.__name__.endswith("PreTrainedModel")
    ]
    stem = kind.__name__.removesuffix("Config")
    return sorted(found, key=lambda m: (m.__name__ not in (f"{stem}Model", stem), m.__name__))


def main() -> int:
    """Print the sizes of the model that the only argument describes; return the exit status.

    Errors are printed as JSON too.
    """
    try:
        print(json.dumps(count_parameters(sys.argv[1]).to_dict()))
    except DstrainError as error:
        problems = [[p.what, p.why, p.remedy] for p in error.problems]
        print(json.dumps({"problems": problems}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
