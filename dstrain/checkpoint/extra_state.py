"""Saving and restoring of modules' extra state (``Module.get_extra_state``)."""

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
"""Last part of the name that torch gives an extra state in a ``state_dict``."""
EXTRA_STATES = "extra_states"
"""Key of ``run.json``, and of ``rank-N.json`` for the states in which that rank differs."""


def extra_states(module: torch.nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Get the extra state of all modules.

    Returns:
        States by the path of the module, and the paths of modules whose state a checkpoint cannot
        hold: only plain values, tensors and arrays can be saved, as pickles are never written.

    Raises:
        CheckpointError: a module's ``get_extra_state`` fails.
    """
    states = {}
    for path, part in _with_extra_state(module):
        try:
            states[path] = part.get_extra_state()
        except Exception as error:  # user code may raise anything
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

    Each rank sends a digest of all its states. Only where digests differ does the main rank send
    its states, encoded as in a checkpoint: a tensor would be received on the main rank's device.

    Returns:
        The main rank's states, and this rank's states that differ from them.
    """
    encoded = {path: encode(state, where="") for path, state in states.items()}
    if len(set(gather_objects(_digest(encoded)))) == 1:
        return states, {}
    main = broadcast_object(encoded)
    different = {p: states[p] for p, form in encoded.items() if p not in main or form != main[p]}
    return {path: decode(form) for path, form in main.items()}, different


def states_for(shared: Mapping[str, Any], rank_state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge the extra states to restore on a rank: its own where saved, else the main rank's.

    Args:
        shared: result of ``read_run``.
        rank_state: result of ``read_rank_state``.
    """
    return {**shared.get(EXTRA_STATES, {}), **(rank_state or {}).get(EXTRA_STATES, {})}


def by_key(states: Mapping[str, Any]) -> dict[str, Any]:
    """Rename states from module paths to their keys in a ``state_dict``."""
    return {f"{path}.{KEY}" if path else KEY: state for path, state in states.items()}


def lost_remark(paths: list[str]) -> str:
    """Return a line that names modules whose extra state a checkpoint cannot hold."""
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
    """Restore the saved extra state of modules.

    Raises:
        CheckpointError: a module no longer exists, or its ``set_extra_state`` fails.
    """
    there = dict(_with_extra_state(module))
    for path, state in states.items():
        if path not in there:
            raise _not_restored(path, "it has none any more")
        try:
            there[path].set_extra_state(state)
        except Exception as error:  # user code may raise anything
            raise _not_restored(path, f"{type(error).__name__}: {error}") from error


def _not_restored(path: str, why: str) -> CheckpointError:
    what = f"{_module(path)} cannot take up its extra state"
    return CheckpointError(Problem(what, why, "resume with the model that was saved"))


def _with_extra_state(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    plain = torch.nn.Module.get_extra_state
    for path, part in module.named_modules():
        if type(part).get_extra_state is not plain:
            yield path, part
