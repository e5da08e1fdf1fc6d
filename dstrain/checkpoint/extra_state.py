"""State that modules keep outside of parameters and buffers (``Module.get_extra_state``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dstrain.checkpoint.codec import decode, encode, is_plain
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.ranks import broadcast_object, gather_objects

KEY = "_extra_state"
"""The last part of torch's name for it in a ``state_dict``."""
EXTRA_STATES = "extra_states"
"""Key of ``run.json``, and of ``rank-N.json`` for the states in which that rank differs."""


def extra_states(module: torch.nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Ask all modules for their extra state.

    Returns:
        states by the path of the module, and the paths of those whose state a checkpoint cannot
        hold: it is made of plain values, tensors and arrays, as pickles are never written.

    Raises:
        CheckpointError: a module fails to give it.
    """
    states = {}
    for path, part in _with_extra_state(module):
        try:
            states[path] = part.get_extra_state()
        except Exception as error:  # of the module's own code, which can be anything
            raise CheckpointError(
                Problem(
                    f"{_module(path)} cannot give its extra state",
                    f"{type(error).__name__}: {error}",
                    "mend its get_extra_state",
                )
            ) from error
    plain = {path: state for path, state in states.items() if is_plain(state)}
    return plain, sorted(states.keys() - plain.keys())


def rank_states(states: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split states into the main rank's and those in which this rank differs; a collective.

    Each rank tells a digest of all its states. Only where these differ the main rank sends its own,
    in the form that a checkpoint has them in: a tensor itself would come to the main rank's device.

    Returns:
        the main rank's states, and those states of this rank that differ from them.
    """
    encoded = {path: encode(state, where="") for path, state in states.items()}
    if len(set(gather_objects(_digest(encoded)))) == 1:
        return states, {}
    main = broadcast_object(encoded)
    different = {p: states[p] for p, form in encoded.items() if p not in main or form != main[p]}
    return {path: decode(form) for path, form in main.items()}, different


def states_for(shared: Mapping[str, Any], rank_state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Choose the extra states that a rank gets back: its own, else the main rank's.

    Args:
        shared: what ``read_run`` gave.
        rank_state: what ``read_rank_state`` gave.
    """
    return {**shared.get(EXTRA_STATES, {}), **(rank_state or {}).get(EXTRA_STATES, {})}


def by_key(states: Mapping[str, Any]) -> dict[str, Any]:
    """Name the states by the keys that they have in a ``state_dict``."""
    return {f"{path}.{KEY}" if path else KEY: state for path, state in states.items()}


def lost_remark(paths: list[str]) -> str:
    """Say of which modules a checkpoint lacks the extra state, in one line."""
    return (
        f"the extra state of {len(paths)} modules ({', '.join(map(_shown, paths[:3]))}) is not in "
        "checkpoints, which hold plain values and tensors only: let get_extra_state return such"
    )


def _digest(encoded: Any) -> str:
    return hashlib.sha256(json.dumps(encoded).encode()).hexdigest()


def _module(path: str) -> str:
    return f"the module {path or '(the model)'}"


def _shown(path: str) -> str:
    return path or "the model"


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
    what = f"{_module(path)} cannot take up its extra state"
    return CheckpointError(Problem(what, why, "resume with the model that was saved"))


def _with_extra_state(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    plain = torch.nn.Module.get_extra_state
    for path, part in module.named_modules():
        if type(part).get_extra_state is not plain:
            yield path, part
