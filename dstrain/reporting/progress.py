"""Showing the progress of training and evaluation: loss, tokens per second, time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from dstrain.reporting.compat import ProgressCallback


class ProgressBar(ProgressCallback):
    """Shows one bar over the optimizer steps, and a short-lived one for each evaluation.

    A ``ProgressCallback`` of transformers, so that scripts find, replace and remove it as one; what
    that one does at each event is done here in another way.
    """

    def __init__(self) -> None:
        """Begin without bars; they are made when training or evaluation begins."""
        super().__init__()
        self._train: tqdm[Any] | None = None
        self._eval: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the training bar on the main rank."""
        if state.is_world_process_zero:
            self._train = _bar(state.max_steps, "train", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by the finished step."""
        if self._train is not None:
            self._train.update(state.global_step - self._train.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Advance the evaluation bar, opening it first."""
        if not state.is_world_process_zero:
            return
        if self._eval is None:
            try:
                total = len(eval_dataloader)
            except TypeError:
                total = None
            self._eval = _bar(total, "eval", leave=False)
        self._eval.update(1)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Close the evaluation bar."""
        if self._eval is not None:
            self._eval.close()
            self._eval = None

    on_predict = on_evaluate

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show loss and speed on the bar, and write the other figures above it."""
        if not state.is_world_process_zero or logs is None:
            return
        if self._train is None or "train_runtime" in logs:  # the summary is shown as a table
            return
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}"}
            if "tokens_per_second" in logs:
                shown["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
            self._train.set_postfix(shown, refresh=False)
        tqdm.write(log_line(logs, step=state.global_step), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the training bar, and that of an evaluation which a signal has ended."""
        self.on_evaluate(args, state, control)
        if self._train is not None:
            self._train.close()
            self._train = None


def log_line(logs: dict[str, Any], *, step: int) -> str:
    """Return one line of a log: ``step 20  loss 6.1023  grad_norm 1.204  ...``."""
    parts = [f"step {step}"]
    for name, value in logs.items():
        if name == "step":
            continue
        parts.append(f"{name} {_number(value)}")
    return "  ".join(parts)


def _number(value: Any) -> str:
    if isinstance(value, float):
        size = abs(value)
        if size and (size < 1e-3 or size >= 1e9):
            return f"{value:.3g}"
        if size >= 1e5:
            return f"{value:,.0f}"
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bar(total: int | None, title: str, *, initial: int = 0, leave: bool = True) -> tqdm[Any]:
    # A bar that goes to a file must not fill it: one line every ten seconds.
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        initial=initial,
        leave=leave,
        dynamic_ncols=interactive,
        ncols=None if interactive else 100,
        mininterval=0.1 if interactive else 10.0,
        unit="step",
        smoothing=0.1,
    )
