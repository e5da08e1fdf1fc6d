"""Methods of a ``Trainer`` that log, write metrics and state, and manage callbacks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.core.errors import raise_problems
from dstrain.core.files import write_record, writing
from dstrain.core.log import get_logger
from dstrain.core.records import recordable, unrecordable
from dstrain.core.secrets import without_secrets
from dstrain.reporting import save_loss_curve
from dstrain.trainer import compat
from dstrain.trainer.count_hooks import CountHooks
from dstrain.trainer.signatures import callback_misfits

logger = get_logger(__name__)


class ReportHooks(CountHooks):
    """Has the methods of transformers' Trainer that log, and write metrics and state."""

    log_metrics = compat.log_metrics
    metrics_format = staticmethod(compat.metrics_format)

    def save_metrics(
        self, split: str, metrics: Mapping[str, object], combined: bool = True
    ) -> None:
        """Write metrics into ``<split>_results.json`` of the run's folder; on the main rank.

        Args:
            split: the data that they are computed on, such as "train".
            metrics: figures by name.
            combined: add them to ``all_results.json`` too.

        Raises:
            TrainingError: the disk is full, the folder is gone, and so on.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_record(folder / f"{split}_results.json", _as_results(metrics))
        if combined:
            path, before = folder / "all_results.json", {}
            if path.exists():
                before = json.loads(path.read_text(encoding="utf-8"))
            write_record(path, _as_results({**before, **metrics}))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch to ``logs``, keep them in ``state.log_history``, tell callbacks.

        Args:
            logs: figures by name.
            start_time: when training began; adds the runtime since then.

        Raises:
            DataError: a figure is an array, or something else that no record can hold.
        """
        logs.update(recordable(logs))
        if self.state.epoch is not None:
            logs["epoch"] = round(self.state.epoch, 4)
        if self.args.counts_tokens != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        if start_time is not None:
            logs |= compat.speed_metrics("train", start_time)
        # A record must stay valid JSON, which knows no NaN: such a figure is left out of it.
        finite = {k: v for k, v in logs.items() if not any(unrecordable(v, finite=True))}
        self.state.log_history.append({**finite, "step": self.state.global_step})
        self.event("on_log", logs=dict(logs))  # transformers' printer takes total_flos out of it

    def _announce(self, loader: object, *, max_steps: int) -> None:
        """Log what is about to be trained."""
        try:
            examples = f"{self.num_examples(loader):,}"
        except TypeError:
            examples = "a stream of"
        logger.info(
            "Running training: %s examples, %d steps of %d (%d a rank, accumulated %d times, %d "
            "ranks), %s trainable parameters",
            examples,
            max_steps,
            self.resolved.global_batch_size,
            self.resolved.micro_batch_size,
            self.resolved.accumulation,
            self.ranks.world_size,
            f"{self.get_num_trainable_parameters():,}",
        )

    def save_state(self) -> None:
        """Write ``trainer_state.json`` and the loss curve into the run's folder.

        Raises:
            TrainingError: the disk is full, the folder is gone, and so on.
        """
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            values = without_secrets(dataclasses.asdict(self.state))
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"  # as transformers has it
            write_record(folder / "trainer_state.json", text)
            with writing(folder / "loss_curve.png"):
                save_loss_curve(self.state.log_history, folder / "loss_curve.png")

    def add_callback(self, callback: Any) -> None:
        """Add a ``TrainerCallback`` class or instance.

        Raises:
            ConfigError: one of its methods cannot take what events pass.
        """
        raise_problems(callback_misfits(callback))
        self.events.handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove and return the first callback that is, or is an instance of, ``callback``."""
        return self.events.handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove the first callback that is, or is an instance of, ``callback``."""
        self.events.handler.remove_callback(callback)

    @property
    def callback_handler(self) -> Any:
        """Return transformers' ``CallbackHandler``; its ``callbacks`` are called in their order."""
        return self.events.handler


def _as_results(metrics: Mapping[str, object]) -> str:
    return json.dumps(metrics, indent=4, sort_keys=True)  # as transformers has it
