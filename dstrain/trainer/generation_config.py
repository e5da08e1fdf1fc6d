"""Finding generation configs that could not be saved with the model, before training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ConfigError, Problem
from dstrain.trainer import compat

if TYPE_CHECKING:
    from transformers import GenerationConfig


def check_generation_config(model: object) -> None:
    """Refuse a model whose generation config cannot be saved.

    transformers saves a config back as it was loaded, and refuses one that was changed since and
    contradicts itself.

    Raises:
        ConfigError: listing the fields that contradict each other.
    """
    config = getattr(model, "generation_config", None)
    generates = getattr(model, "can_generate", lambda: False)
    if config is None or has_adapters(model) or not generates():
        return
    if (error := why_not_saved(config)) is not None:
        raise ConfigError(
            Problem(
                "model.generation_config contradicts itself",
                f"{error}\nsaving the model would fail of it, after training",
                "before the Trainer is made, set do_sample=True where it is to sample (num_beams "
                "above 1 for beams), or the fields that are named to None",
            )
        )


def why_not_saved(config: GenerationConfig) -> ValueError | None:
    """Return the error that ``save_pretrained`` of a generation config would raise, or None."""
    try:
        config.validate(strict=not compat.is_as_loaded(config))
    except ValueError as error:
        return error
    return None


@contextlib.contextmanager
def changing(config: GenerationConfig) -> Iterator[None]:
    """Let the block change a generation config that counts as loaded, and still does afterwards.

    Otherwise contradictions that it had when it was published would keep it from being saved.
    """
    as_loaded = compat.is_as_loaded(config)
    yield
    if as_loaded:
        compat.mark_as_loaded(config)
