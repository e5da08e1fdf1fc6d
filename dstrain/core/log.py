"""Logging: a logger for each module under ``dstrain``, with a level for each rank."""

from __future__ import annotations

import logging
import sys

from dstrain.core.secrets import HidesSecrets

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


_HIDES_SECRETS = HidesSecrets()


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name`` (pass ``__name__``), which masks credentials in its records."""
    logger = logging.getLogger(name)
    logger.addFilter(_HIDES_SECRETS)  # does nothing when the logger already has it
    return logger


def configure(*, level: int, rank: int, world_size: int) -> None:
    """Set the level of the logger ``dstrain``; add a handler when the application has none.

    The handler writes through tqdm so that a line never breaks a progress bar.
    """
    logger = logging.getLogger("dstrain")
    logger.setLevel(level)
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = _BarFriendlyHandler()
    tag = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler.setFormatter(logging.Formatter(f"{tag}%(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False


class _BarFriendlyHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
