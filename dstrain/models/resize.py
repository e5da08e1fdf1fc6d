"""Another vocabulary for a partitioned model: its embeddings are whole while they are resized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dstrain.engine import Partitioner, building_whole_models, full_shape, gathered, is_partitioned


def resize_partitioned(
    model: Any, resize: Callable[..., Any], *args: Any, partitioner: Partitioner, **kwargs: Any
) -> Any:
    """Resize as transformers does it with a whole model; a collective of all ranks.

    Each rank holds whole what the size of the vocabulary changes (embeddings, output embeddings and
    what is tied to them), and draws new rows; the main rank's are kept.

    Args:
        model: with partitioned parameters.
        resize: the model's own method, given the model first.
        *args: of the method.
        partitioner: takes the resized parameters apart.
        **kwargs: of the method.
    """
    _make_whole(model, _affected_parameters(model))
    try:
        with building_whole_models():
            return resize(model, *args, **kwargs)
    finally:  # arguments that transformers refuses leave the model partitioned, as it was
        partitioner.split_like_main_rank(model.parameters())


def _affected_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return partitioned parameters that resizing may replace or look at.

    All embeddings are among them: some models have further ones of the vocabulary (per layer).
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    paths = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    ends = {id(module) for module in _embeddings(model)}
    sizes = {full_shape(module.weight)[0] for module in _embeddings(model)}
    found = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            near = isinstance(module, torch.nn.Embedding) or id(module) in ends or path in paths
            near = near or not sizes.isdisjoint(full_shape(parameter))
            if near and is_partitioned(parameter):
                found[id(parameter)] = parameter
    return list(found.values())


def _embeddings(model: Any) -> Iterator[Any]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            yield module


def _make_whole(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> None:
    """Put ordinary parameters in the place of partitioned ones, wherever they are used."""
    whole: dict[int, torch.nn.Parameter] = {}
    for parameter in parameters:
        with gathered([parameter]), torch.no_grad():
            values = parameter.detach().clone()
        whole[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, old in module._parameters.items():
            if id(old) in whole:
                module._parameters[name] = whole[id(old)]
