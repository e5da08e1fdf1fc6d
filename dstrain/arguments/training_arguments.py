"""``TrainingArguments``: one flat public dataclass whose fields are grouped by subject."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from dstrain.arguments.batch import BatchArguments
from dstrain.arguments.evaluation import EvaluationArguments
from dstrain.arguments.fields import coerce_fields, default_of
from dstrain.arguments.optimizer import OptimizerArguments
from dstrain.arguments.precision import PrecisionArguments
from dstrain.arguments.reporting import ReportingArguments
from dstrain.arguments.run import RunArguments
from dstrain.arguments.zero import ZeroArguments
from dstrain.core.errors import ConfigError, Problem, raise_problems
from dstrain.core.log import LEVELS
from dstrain.core.ranks import launched_ranks


# dataclasses collect fields from the last base to the first: output_dir comes first, as documented.
@dataclass
class TrainingArguments(
    ReportingArguments,
    EvaluationArguments,
    ZeroArguments,
    PrecisionArguments,
    OptimizerArguments,
    BatchArguments,
    RunArguments,
):
    """Everything a user decides about a training run.

    Raises:
        ConfigError: on construction, listing every field whose value cannot be used and every
            pair of fields that contradict each other.
    """

    # Read by transformers' callbacks; checkpoints during training arrive with their own fields.
    save_strategy = "no"
    save_steps = 0
    load_best_model_at_end = False
    metric_for_best_model = None
    greater_is_better = None

    def __post_init__(self) -> None:
        """Convert strings to the declared types, fill derived defaults, report all problems."""
        if isinstance(self.zero_stage, int) and not isinstance(self.zero_stage, bool):
            self.zero_stage = str(self.zero_stage)
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        problems = coerce_fields(self) + self._read_scheduler_kwargs()
        raise_problems(problems, error=ConfigError)
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.eval_strategy != "no":
            self.do_eval = True
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.use_cpu:
            self.dataloader_pin_memory = False
        raise_problems(self._problems(), error=ConfigError)

    def _problems(self) -> list[Problem]:
        return [
            *self._run_problems(),
            *self._batch_problems(),
            *self._optimizer_problems(),
            *self._precision_problems(),
            *self._zero_problems(),
            *self._evaluation_problems(),
            *self._reporting_problems(),
        ]

    def changed_fields(self) -> frozenset[str]:
        """Names of the fields whose value differs from their documented default."""
        return frozenset(
            f.name for f in dataclasses.fields(self) if getattr(self, f.name) != default_of(f)
        )

    @property
    def train_batch_size(self) -> int:
        """Micro-batch of this process (a process drives one device)."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Evaluation batch of this process (a process drives one device)."""
        return self.per_device_eval_batch_size

    @property
    def world_size(self) -> int:
        """Number of processes over all machines."""
        return launched_ranks().world_size

    @property
    def process_index(self) -> int:
        """Rank of this process among all."""
        return launched_ranks().rank

    @property
    def local_process_index(self) -> int:
        """Rank of this process on its machine."""
        return launched_ranks().local_rank

    @property
    def should_log(self) -> bool:
        """Whether this process logs as a main process."""
        if self.log_on_each_node:
            return self.local_process_index == 0
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes the files that exist once."""
        return self.process_index == 0

    def get_process_log_level(self) -> int:
        """Level of this process as ``logging`` counts them; passive is INFO where it may log."""
        name = self.log_level if self.should_log else self.log_level_replica
        return LEVELS.get(name, LEVELS["info"] if self.should_log else LEVELS["warning"])

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for trackers and records."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def to_json_string(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """``to_dict`` with every value a bool, number or text, plus the batch sizes."""
        values = self.to_dict() | {
            "train_batch_size": self.train_batch_size,
            "eval_batch_size": self.eval_batch_size,
        }
        return {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()
        }
