"""Checks of the error that ends a command with bad input."""

from __future__ import annotations

import pytest


def the_error(status: int, captured: pytest.CaptureResult[str]) -> str:
    """Return the text of the one error on standard error."""
    assert captured.err.count("dstrain: error: ") == 1, captured.err
    assert "Traceback" not in captured.err
    assert status == 2, captured.err
    assert captured.out == ""
    error = captured.err.split("dstrain: error: ")[1]
    # Also what a library says in several lines stays below what it explains.
    assert all(line.startswith("  ") for line in error.splitlines()[1:]), error
    return error


TRAIN = ("train", "causal-lm")
ZERO_STAGE_TWICE = '{"zero_optimization": {"stage": 2, "stage": 3}}'
