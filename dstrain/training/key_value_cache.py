"""Turning the key-value cache of a model off in the forward passes of a run.

A forward pass over whole sequences fills a cache for nothing. It also does harm: with a cache
transformers does not look for packed sequences (``masking_utils``: ``past_key_values is None``), so
that they attend to each other; a layer that is computed again in the backward pass would add its
keys twice; and a cache among the outputs is nothing that metrics could be given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dstrain.core.adapters import inner_model


class KeyValueCache:
    """Turns the caches of a module and of all models inside of it off, for some forward passes.

    Or on, that of the model itself, where ``use_cache`` says so: prefix and prompt tuning pass
    what they learn as a cache.

    A model asks its config whether to use a cache where its caller does not say. So a batch, a
    subclass or ``generate`` that passes ``use_cache`` still decides for itself, and models whose
    ``forward`` has no such argument are reached, as are those inside of a wrapper. Outside of
    ``as_asked`` the configs are the user's: what is saved or shown is what they said.
    """

    def __init__(self, module: torch.nn.Module, *, used: bool = False) -> None:
        """Find the configs: of the module, of models inside of it, and those nested in them.

        Args:
            module: the model.
            used: the argument ``use_cache``.
        """
        self._used = used
        self._configs: list[Any]
        if used:
            config = getattr(inner_model(module), "config", None)
            self._configs = [config] if hasattr(config, "use_cache") else []
        else:
            self._configs = _configs_with_cache(module)

    @contextlib.contextmanager
    def as_asked(self) -> Iterator[None]:
        """Turn the caches off or on in the block; whatever happens, they are as before after it."""
        before = [(config, config.use_cache) for config in self._configs]
        for config, _ in before:
            config.use_cache = self._used
        try:
            yield
        finally:
            for config, value in before:
                config.use_cache = value


def _configs_with_cache(module: torch.nn.Module) -> list[Any]:
    """List the configs of a model's modules that turn a cache on.

    Visits every module once.
    """
    from transformers import PreTrainedConfig

    found: dict[int, Any] = {}

    def take(config: object) -> None:
        if not isinstance(config, PreTrainedConfig) or id(config) in found:
            return
        found[id(config)] = config
        for value in vars(config).values():
            take(value)

    for part in module.modules():
        # Of a wrapper, `config` may be the model's own: asked for by PEFT's `__getattr__`.
        take(getattr(part, "config", None))
    return [config for config in found.values() if getattr(config, "use_cache", None)]
