"""Drawing the loss curve of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def save_loss_curve(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw training and evaluation loss over steps into a PNG.

    Args:
        history: logged entries with "step" and "loss" or "eval_loss".
        path: the PNG.

    Returns:
        Whether there was anything to draw.
    """
    train = [(e["step"], e["loss"]) for e in history if "loss" in e]
    evaluated = sorted({e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}.items())
    if not train and not evaluated:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        marker = "o" if len(train) < 2 else None
        axes.plot(*zip(*train, strict=True), label="training", linewidth=1.5, marker=marker)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), label="evaluation", marker="o", linewidth=1.5)
        step, loss = evaluated[-1]
        axes.annotate(
            f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(-4, 8), ha="right"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True
