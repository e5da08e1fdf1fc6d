"""The headers of slice files: what each says it holds, checked against itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.files import reading
from dstrain.checkpoint.slice_table import RankSlices
from dstrain.core.documents import Count, Number, Text, parsed, typed

_Spans: Any = Mapping[Text, tuple[Count, Count]]
_Scalars: Any = Mapping[Text, Mapping[Text, Number]]


def read_rank_slices(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> RankSlices:
    """Read the header of a slice file; no tensor is touched.

    Args:
        path: the file.
        shapes: of the checkpoint's parameters.

    Raises:
        CheckpointError: the file is damaged, or contradicts itself or the shapes.
    """
    with reading(path) as file:
        sizes = {name: file.numel(name) for name in file.keys()}  # noqa: SIM118
        spans = _mapping(file.metadata, "spans", _Spans)
        scalars = _mapping(file.metadata, "scalars", _Scalars)
        _check_spans(spans, sizes, shapes)
    return RankSlices.of(sizes, spans, scalars)


def _check_spans(
    spans: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the metadata of a file of slices against its tensors and the parameters.

    Raises:
        ValueError: they contradict each other.
    """
    for name, (start, numel) in spans.items():
        if name not in shapes:
            raise ValueError(f"{name} is none of the checkpoint's parameters")
        whole = torch.Size(shapes[name]).numel()
        if start + numel > whole:
            raise ValueError(
                f"it has elements {start} to {start + numel} of {name}, which has {whole}"
            )
    for tensor, size in sizes.items():
        _, _, name = tensor.partition("/")
        if name not in spans:
            raise ValueError(f"its spans do not name {tensor}")
        if size != spans[name][1]:
            raise ValueError(f"it has {size} elements of {tensor}, its spans say {spans[name][1]}")


def _mapping(metadata: Mapping[str, str], name: str, kind: Any) -> Any:
    """Read an entry of the metadata of a file of slices.

    Raises:
        ValueError: the entry is missing or malformed.
    """
    if name not in metadata:
        raise ValueError(f"it has no {name} in its metadata: it is no file of slices")
    try:
        return typed(parsed(metadata[name].encode()), kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
