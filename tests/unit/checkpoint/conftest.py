"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checkpoint.forged import whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a small committed checkpoint."""
    return whole(tmp_path / "run")
