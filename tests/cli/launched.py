"""Checks of runs of the launcher in which a rank breaks."""

from __future__ import annotations

import subprocess
from pathlib import Path

TIMEOUT_SECONDS = 240.0  # for machines that do other things too


def the_others_end(
    done: subprocess.CompletedProcess[str], folder: Path, ended: float, *, where: str
) -> None:
    """Check what holds when rank 1 has broken: status, how soon all ended, what is shown."""
    assert (folder / "broke").exists(), done.stdout + done.stderr
    assert ended - float((folder / "broke").read_text()) < 60
    assert done.returncode != 0
    assert "went on to the end" not in done.stdout
    shown = done.stderr
    assert "Traceback (most recent call last)" in shown
    assert "RuntimeError: rank 1 broke on purpose" in shown
    assert where in shown
    assert "model, metrics and loss_curve.png are in" not in done.stdout
