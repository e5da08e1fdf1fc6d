"""Choosing the callbacks that report a run: trackers by name, progress bar or plain lines."""

from __future__ import annotations

import copy
import dataclasses
import os
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dstrain.core.errors import ConfigError, Problem, nearest
from dstrain.core.files import expanded
from dstrain.core.log import get_logger
from dstrain.core.secrets import command_without_secrets, without_secrets
from dstrain.reporting import compat
from dstrain.reporting.progress import ProgressBar

logger = get_logger(__name__)

_EXTRAS = ("wandb", "tensorboard")
# Trackers that transformers leaves out of the installed ones, always or beside mlflow.
_NOT_DETECTED = ("flyte", "azure_ml")
_YES = ("true", "1", "yes", "on")


def tracker_callbacks(report_to: Sequence[str] | None) -> list[Any]:
    """Return the tracker callback classes for ``report_to``.

    None and "all" take every installed tracker, except W&B where it has neither key nor offline
    mode: it would stop the run to ask. "none" and an empty list take none.

    Raises:
        ConfigError: an unknown tracker, or one that was named but is not installed.
    """
    names = ["all"] if report_to is None else list(report_to)
    if names in ([], ["none"]):
        return []
    installed = compat.get_available_reporting_integrations()
    if "all" in names:
        names = [n for n in installed if n != "wandb" or _wandb_is_set_up()]
    problems = []
    for name in names:
        if name not in compat.INTEGRATION_TO_CALLBACK:
            close = nearest(name, set(compat.INTEGRATION_TO_CALLBACK))
            fix = f"did you mean {close!r}?" if close else ""
            problems.append(Problem(f"report_to={name!r}", "no such tracker", fix))
        elif name not in installed and name not in _NOT_DETECTED:
            package = f"dstrain[{name}]" if name in _EXTRAS else name.replace("_", "-")
            problems.append(
                Problem(f"report_to={name!r}", "it is not installed", f"pip install {package}")
            )
    if "dvclive" in names and os.environ.get("HF_DVCLIVE_LOG_MODEL", "").lower() in _YES:
        problems.append(
            Problem(
                "HF_DVCLIVE_LOG_MODEL with report_to=dvclive",
                "transformers' callback saves the model with its own Trainer, which knows no ZeRO",
                "set it to all, which takes the checkpoints, or leave it out",
            )
        )
    if problems:
        raise ConfigError(problems)
    return [_class_to_use(c) for c in compat.get_reporting_integration_callbacks(names)]


def _class_to_use(callback: Any) -> Any:
    """Return a callback class that runs here as it should: transformers', or one made of it."""
    if callback is compat.INTEGRATION_TO_CALLBACK["wandb"]:
        callback = _whole_model()
    elif callback is compat.INTEGRATION_TO_CALLBACK.get("clearml"):
        callback = _without_credentials(callback)
    return _without_command_credentials(callback) if hasattr(callback, "setup") else callback


def _without_command_credentials(callback: Any) -> Any:
    """Return a callback class whose tracker sees masks in place of credentials of this command.

    W&B and others send ``sys.argv`` when a run begins.
    """

    class Careful(callback):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            with command_without_secrets():
                super().setup(*args, **kwargs)

    return _named_like(callback, Careful)


def _without_credentials(callback: Any) -> Any:
    """Return a callback class that masks credentials where it would send the arguments themselves.

    What the tracker changes in them is taken over: ClearML does so for a run that it starts.
    """

    class Careful(callback):
        def setup(self, args: Any, *rest: Any, **kwargs: Any) -> None:
            names = [field.name for field in dataclasses.fields(args)]
            shown = copy.copy(args)
            for name in names:
                setattr(shown, name, without_secrets(getattr(args, name), name))
            before = {name: getattr(shown, name) for name in names}
            super().setup(shown, *rest, **kwargs)
            for name in names:
                if getattr(shown, name) is not before[name]:
                    setattr(args, name, getattr(shown, name))

    return _named_like(callback, Careful)


def _named_like(callback: Any, ours: Any) -> Any:
    ours.__name__, ours.__qualname__ = callback.__name__, callback.__qualname__
    return ours


def _whole_model() -> Any:
    """Return dstrain's callback of W&B: transformers' would save the model with its own Trainer."""
    from dstrain.reporting.wandb_tracker import WandbCallback

    return WandbCallback


def progress_callback(*, quiet: bool) -> Any:
    """Return the callback class that shows progress: plain lines, a notebook's table, or a bar."""
    if quiet:
        return compat.PrinterCallback
    if compat.is_in_notebook():
        return compat.notebook_progress()
    return ProgressBar


def set_tensorboard_folder(logging_dir: str | None, output_dir: str) -> str:
    """Choose TensorBoard's folder; transformers' callback reads it from the environment only."""
    if logging_dir is None:
        stamp = datetime.now().strftime("%b%d_%H-%M-%S")
        logging_dir = str(Path(output_dir) / "runs" / f"{stamp}_{socket.gethostname()}")
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir
    return logging_dir


def _wandb_is_set_up() -> bool:
    mode = os.environ.get("WANDB_MODE", "").lower()
    netrc = expanded(os.environ.get("NETRC", "~/.netrc"))
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
    )
    ready = has_key or mode in ("offline", "disabled", "dryrun")
    if not ready:
        logger.info(
            "W&B is installed but not set up, so this run is not reported there "
            "(wandb login, WANDB_API_KEY or WANDB_MODE=offline; report_to=none silences this)"
        )
    return ready
