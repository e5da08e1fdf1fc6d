"""The loss curve of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.reporting import (
    save_loss_curve,
)

PNG = b"\x89PNG\r\n\x1a\n"

HISTORY = [
    {"step": 0, "eval_loss": 9.0},
    {"step": 10, "loss": 8.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 6.0},
    {"step": 20, "eval_loss": 6.5},
    {"step": 20, "train_runtime": 3.0},
    {"step": 20, "eval_loss": 6.25},
]


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        HISTORY[:1],
        [{"step": 1, "loss": math.nan}, {"step": 1, "eval_loss": math.nan}],
    ],
    ids=["both", "evaluation only", "nan"],
)
def test_a_loss_curve_is_a_picture(tmp_path, history):
    file = tmp_path / "curve.png"
    assert save_loss_curve(history, file) is True
    assert file.read_bytes().startswith(PNG)


@pytest.mark.parametrize("history", [[], [{"step": 1, "train_runtime": 3.0}]])
def test_nothing_to_draw_leaves_no_file(tmp_path, history):
    assert save_loss_curve(history, tmp_path / "curve.png") is False
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def drawn(monkeypatch) -> Callable[[list[dict[str, float]]], dict[str, Any]]:
    """Draw a history without writing it; return the lines of the picture by their label."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))

    def draw(history: list[dict[str, float]]) -> dict[str, Any]:
        save_loss_curve(history, Path("curve.png"))
        return {line.get_label(): line for line in figures[-1].axes[0].lines}

    return draw


def test_the_curve_shows_the_logged_points(drawn):
    """Both losses at their steps; of two evaluations at one step the later counts."""
    points = {label: line.get_xydata().tolist() for label, line in drawn(HISTORY).items()}
    assert points == {
        "training": [[10.0, 8.0], [20.0, 6.0]],
        "evaluation": [[0.0, 9.0], [20.0, 6.25]],
    }


def test_a_single_point_is_visible(drawn):
    """A line through one point is none; a short run logs once."""
    assert drawn(HISTORY[1:2])["training"].get_marker() == "o"
    assert drawn(HISTORY)["training"].get_marker() in (None, "None")
