"""Weights in models and in files, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the state, with partitioned parameters gathered; a collective of all ranks."""
    from dstrain.engine import gathered

    with gathered(model.parameters()):
        return {n: t.detach().clone() for n, t in model.state_dict().items()}


def in_files(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything in the safetensors files of a folder."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def differences(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> list[str]:
    """Say in a line for each tensor that only one has, or that differs at all."""
    lines = [f"lacks {name}" for name in expected.keys() - found.keys()]
    lines += [f"has {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        here, there = expected[name], found[name]
        if here.shape != there.shape:
            lines.append(f"{name}: {tuple(there.shape)} for {tuple(here.shape)}")
        elif here.dtype != there.dtype:
            lines.append(f"{name}: {there.dtype} for {here.dtype}")
        elif not torch.equal(here.view(-1).view(torch.uint8), there.view(-1).view(torch.uint8)):
            lines.append(f"{name}: other values")
    return sorted(lines)
