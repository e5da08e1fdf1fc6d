"""Runs that are killed again and again while they save and rotate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.forked import run_job
from tests.distributed.jobs import KILLS


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_was(tmp_path: Path) -> None:
    """One rank or all, at seeded random moments; nothing committed is lost, ever."""
    found = run_job("kills", tmp_path, timeout=400)
    assert found["problems"] == []
    assert found["same"] == [True, True]
    assert found["kills"] >= KILLS
    # The kills are worth something: many fell into a save or a removal.
    assert sum(found["left"].values()) >= KILLS // 4
