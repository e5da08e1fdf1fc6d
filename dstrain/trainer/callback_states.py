"""States of callbacks, and of the trainer, in a checkpoint's ``trainer_state.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.secrets import is_mask
from dstrain.training.types import PlainState

if TYPE_CHECKING:
    from transformers import TrainerState

    from dstrain.trainer.compat import ExportableState

logger = get_logger(__name__)


def state_values(state: TrainerState, exportable: Iterable[ExportableState]) -> PlainState:
    """Make ``trainer_state.json`` as transformers writes it.

    Args:
        state: the trainer's state.
        exportable: the control, and the callbacks whose states checkpoints hold.
    """
    values = dataclasses.asdict(state)
    states: PlainState = {}
    for callback in exportable:
        name = type(callback).__name__
        if name in states:
            earlier = states[name]
            states[name] = [*(earlier if isinstance(earlier, list) else [earlier])]
            states[name].append(callback.state())
        else:
            states[name] = callback.state()
    values["stateful_callbacks"] = states
    return values


def last_metrics(state: TrainerState) -> dict[str, float]:
    """Return the metrics of the evaluation at the present step, over all evaluation sets."""
    metrics: dict[str, float] = {}
    for entry in reversed(state.log_history):
        if entry.get("step") != state.global_step:
            break
        metrics = {k: v for k, v in entry.items() if k.startswith("eval_")} | metrics
    return metrics


def restore_callbacks(
    callbacks: list[object], saved: Mapping[str, object], *, is_main: bool
) -> None:
    """Give callbacks of the same class their saved state; say which saved ones are not here."""
    for kind, states in saved.items():
        if kind == "TrainerControl":
            continue  # what it tells the loop to do is decided anew
        places = [i for i, c in enumerate(callbacks) if type(c).__name__ == kind]
        for index, state in zip(places, states if isinstance(states, list) else [states]):  # noqa: B905
            callbacks[index] = _restored(callbacks[index], state)
        if not places and is_main:
            logger.warning("the checkpoint has the state of a %s, which this run has not", kind)


def _restored(callback: object, state: Mapping[str, Any]) -> object:
    """Make a callback of the same class from a saved state, as ``ExportableState`` does.

    Credentials are not in a checkpoint: they are those of this run's callback.

    Raises:
        CheckpointError: the class cannot take up that state.
    """
    kind = type(callback)
    try:
        arguments = _with_own_credentials(state.get("args", {}), callback)
        restored = kind(**arguments)
        for name, value in _with_own_credentials(state.get("attributes", {}), callback).items():
            # A state holds what an object has for itself, never what its class does.
            if name.startswith("__") or callable(getattr(kind, name, None)):
                raise ValueError(f"{name} is no attribute that a state can set")
            setattr(restored, name, value)
    except Exception as error:  # of the callback's own, which can be any class of a user's
        raise CheckpointError(
            Problem(
                f"the callback {kind.__name__} cannot take up its state in the checkpoint",
                f"{type(error).__name__}: {error}",
                "resume with the callback of the run that wrote it, or leave "
                "restore_callback_states_from_checkpoint out",
            )
        ) from error
    return restored


def _with_own_credentials(saved: Mapping[str, object], callback: object) -> PlainState:
    """Return a callback's saved values, with its present ones where a credential is masked."""
    return {
        name: getattr(callback, name, None) if is_mask(name, value) else value
        for name, value in saved.items()
    }
