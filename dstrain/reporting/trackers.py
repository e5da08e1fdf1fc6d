"""Which callbacks report a run: trackers by name, progress bar or plain lines."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dstrain.core.errors import ConfigError, Problem, nearest
from dstrain.core.log import get_logger

logger = get_logger(__name__)

_EXTRAS = ("wandb", "tensorboard")
# Trackers that transformers leaves out of the installed ones, always or beside mlflow.
_NOT_DETECTED = ("flyte", "azure_ml")


def tracker_callbacks(report_to: Sequence[str] | None) -> list[Any]:
    """The tracker callback classes for ``report_to``.

    None and "all" take every installed tracker, except W&B where it has neither key nor offline
    mode: it would stop the run to ask. "none" and an empty list take no one.

    Raises:
        ConfigError: an unknown tracker, or one that was named but is not installed.
    """
    from dstrain.reporting import compat

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
    if problems:
        raise ConfigError(problems)
    return list(compat.get_reporting_integration_callbacks(names))


def set_tensorboard_folder(logging_dir: str | None, output_dir: str) -> str:
    """Choose TensorBoard's folder; transformers' callback reads it from the environment only."""
    if logging_dir is None:
        stamp = datetime.now().strftime("%b%d_%H-%M-%S")
        logging_dir = str(Path(output_dir) / "runs" / f"{stamp}_{socket.gethostname()}")
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir
    return logging_dir


def _wandb_is_set_up() -> bool:
    mode = os.environ.get("WANDB_MODE", "").lower()
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
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
