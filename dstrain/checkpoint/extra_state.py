"""State that modules keep outside of parameters and buffers (``Module.get_extra_state``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dstrain.checkpoint.codec import is_plain
from dstrain.core.errors import CheckpointError, Problem


def extra_states(module: torch.nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Ask all modules for their extra state.

    Returns:
        states by the path of the module, and the paths of those whose state a checkpoint cannot
        hold: it is made of plain values, tensors and arrays, as pickles are never written.
    """
    states = {path: part.get_extra_state() for path, part in _with_extra_state(module)}
    plain = {path: state for path, state in states.items() if is_plain(state)}
    return plain, sorted(states.keys() - plain.keys())


def put_extra_states(module: torch.nn.Module, states: Mapping[str, Any]) -> None:
    """Give modules the extra state back that they had when it was saved.

    Raises:
        CheckpointError: a module is not there any more, or cannot take up its state.
    """
    there = dict(_with_extra_state(module))
    for path, state in states.items():
        if path not in there:
            raise _useless(path, "it has none any more")
        try:
            there[path].set_extra_state(state)
        except Exception as error:  # of the module's own code, which can be anything
            raise _useless(path, f"{type(error).__name__}: {error}") from error


def _useless(path: str, why: str) -> CheckpointError:
    what = f"the module {path or '(the model)'} cannot take up its extra state"
    return CheckpointError(Problem(what, why, "resume with the model that was saved"))


def _with_extra_state(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    plain = torch.nn.Module.get_extra_state
    for path, part in module.named_modules():
        if type(part).get_extra_state is not plain:
            yield path, part
