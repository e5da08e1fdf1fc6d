"""Taking arguments of a ``Trainer`` by their old names, with a warning."""

from __future__ import annotations

from typing import Any

from dstrain.arguments.enforce import warn
from dstrain.core.errors import ConfigError, Problem
from dstrain.training.types import ProcessingClass


def one_name(processing_class: object, tokenizer: object) -> ProcessingClass:
    """Return what was passed as ``processing_class``, or by its old name ``tokenizer``.

    Raises:
        ConfigError: both were passed.
    """
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ConfigError(
            Problem(
                "tokenizer and processing_class were both passed",
                "tokenizer is the old name of processing_class",
                "keep processing_class alone",
            )
        )
    warn("Trainer(tokenizer=...) is deprecated: pass it as processing_class", FutureWarning)
    return tokenizer


def old_resume(resume: str | bool | None, kwargs: dict[str, Any]) -> str | bool | None:
    """Return ``resume_from_checkpoint``, or what was passed by its old name ``model_path``.

    Raises:
        TypeError: another keyword.
    """
    if "model_path" in kwargs:
        warn("train(model_path=...) is deprecated: use resume_from_checkpoint", FutureWarning)
        resume = kwargs.pop("model_path")
    if kwargs:
        raise TypeError(f"train() got unexpected keyword arguments: {', '.join(sorted(kwargs))}")
    return resume
