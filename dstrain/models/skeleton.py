"""Names, shapes and order of a model's parameters, from its config and without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.core.documents import parsed
from dstrain.core.errors import ModelError, Problem
from dstrain.engine import decay_parameter_names
from dstrain.models.folder import library_errors


@dataclass(frozen=True)
class Skeleton:
    """Structure of the model that a ``config.json`` describes.

    Attributes:
        parameters: name -> shape, in the order of the module; tied parameters only under their
            first name.
        tied: each further name of a tied parameter -> its first name.
        buffers: names of persistent buffers.
        decayed: names of parameters with weight decay, by the rule of transformers' Trainer.
    """

    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    buffers: tuple[str, ...]
    decayed: list[str]


def skeleton_of(folder: Path) -> Skeleton:
    """Return the structure of a folder's model from ``config.json``, executing no code from there.

    Raises:
        ModelError: there is no config, or transformers does not have its architecture.
    """
    module = module_without_memory(folder)
    first = {id(p): n for n, p in module.named_parameters()}
    tied = {
        n: first[id(p)]
        for n, p in module.named_parameters(remove_duplicate=False)
        if first[id(p)] != n
    }
    persistent = module.state_dict(keep_vars=True)
    decayed = set(decay_parameter_names(module))
    return Skeleton(
        {n: tuple(p.shape) for n, p in module.named_parameters()},
        tied,
        tuple(n for n, _ in module.named_buffers() if n in persistent),
        [n for n, _ in module.named_parameters() if n in decayed],
    )


def module_without_memory(folder: Path) -> Any:
    """Build the model of a folder's ``config.json`` on the meta device.

    Uses only classes of transformers, and executes no code from the folder.

    Raises:
        ModelError: there is no config, or transformers does not have its architecture.
    """
    import transformers

    path = folder / "config.json"
    try:
        config: dict[str, Any] = parsed(path.read_bytes())
        name = config["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            Problem(f"{path} does not name the model's architecture", f"{error}")
        ) from error
    architecture = getattr(transformers, name, None)
    if not isinstance(architecture, type) or not issubclass(architecture, torch.nn.Module):
        raise ModelError(Problem(f"{path} names {name!r}", "transformers has no such model"))
    with library_errors(f"no model can be built from {path}"), torch.device("meta"):
        return architecture(transformers.AutoConfig.from_pretrained(folder))
