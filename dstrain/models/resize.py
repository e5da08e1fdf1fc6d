"""Resizing of the token embeddings of a partitioned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dstrain.engine import Partitioner, building_whole_models, full_shape, gathered, is_partitioned


def resize_partitioned(
    model: Any, resize: Callable[..., Any], *args: Any, partitioner: Partitioner, **kwargs: Any
) -> Any:
    """Resize a model's embeddings by transformers' code; a collective of all ranks.

    Meanwhile each rank has all parameters whole whose size depends on the vocabulary (embeddings,
    output embeddings and parameters that are tied to these). Each rank draws new rows; those of the
    main rank are kept.

    Args:
        model: the model, with partitioned parameters.
        resize: the model's method, which is called with the model as its first argument.
        *args: further arguments of the method.
        partitioner: partitions the resized parameters.
        **kwargs: keyword arguments of the method.
    """
    _make_whole(model, _affected_parameters(model))
    try:
        with building_whole_models():
            return resize(model, *args, **kwargs)
    finally:  # also if transformers refuses the arguments
        partitioner.split_like_main_rank(model.parameters())


def _affected_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the partitioned parameters that resizing may replace or read.

    They include all embeddings, since some models have further ones for the vocabulary in each
    layer.
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
    """Yield the input and output embeddings of a model, if they have weights."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            yield module


def _make_whole(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> None:
    """Replace partitioned parameters by ordinary, whole ones in all modules; a collective."""
    whole: dict[int, torch.nn.Parameter] = {}
    for parameter in parameters:
        with gathered([parameter]), torch.no_grad():
            values = parameter.detach().clone()
        whole[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, old in module._parameters.items():
            if id(old) in whole:
                module._parameters[name] = whole[id(old)]
