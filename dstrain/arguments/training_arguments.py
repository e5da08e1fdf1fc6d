"""``TrainingArguments``: one flat public dataclass whose fields are grouped by subject."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from dstrain.arguments import enforce
from dstrain.arguments.activation_checkpointing import ActivationCheckpointingArguments
from dstrain.arguments.batch import BatchArguments
from dstrain.arguments.choice import Choice
from dstrain.arguments.communication import CommunicationArguments
from dstrain.arguments.data import DataArguments
from dstrain.arguments.dicts import read_dicts
from dstrain.arguments.evaluation import EvaluationArguments
from dstrain.arguments.features import FeatureArguments
from dstrain.arguments.fields import coerce_fields, convert_values, default_of
from dstrain.arguments.hub import HubArguments
from dstrain.arguments.offload import OffloadArguments
from dstrain.arguments.optimizer import METRIC_SCHEDULERS, WITHOUT_WARMUP, OptimizerArguments
from dstrain.arguments.other_back_ends import OtherBackEndArguments
from dstrain.arguments.precision import PrecisionArguments
from dstrain.arguments.process import Process
from dstrain.arguments.records import Records
from dstrain.arguments.reporting import ReportingArguments
from dstrain.arguments.run import RunArguments
from dstrain.arguments.saving import SavingArguments
from dstrain.arguments.setters import Setters
from dstrain.arguments.zero import ZeroArguments
from dstrain.core.errors import ConfigError, Problem, raise_problems

# Numbers of steps or epochs, or below 1 shares of all steps.
_STEPS = ("logging_steps", "save_steps", "eval_steps", "eval_delay", "warmup_steps")
# Arguments whose values are members of enums in transformers.
_LIKE_ENUMS = (
    "eval_strategy",
    "logging_strategy",
    "save_strategy",
    "hub_strategy",
    "lr_scheduler_type",
    "optim",
)


# dataclasses collect fields from the last base to the first: output_dir comes first, as documented.
@dataclass(repr=False)
class TrainingArguments(
    Setters,
    Records,
    OtherBackEndArguments,
    HubArguments,
    Process,
    ReportingArguments,
    SavingArguments,
    EvaluationArguments,
    FeatureArguments,
    ActivationCheckpointingArguments,
    CommunicationArguments,
    OffloadArguments,
    ZeroArguments,
    PrecisionArguments,
    OptimizerArguments,
    DataArguments,
    BatchArguments,
    RunArguments,
):
    """Arguments of a training run.

    The treatment of each argument is declared with its field, and listed in the README beside this
    file.

    Raises:
        ConfigError: from the constructor, when values cannot be used, contradict each other, or are
            refused; the error lists all problems.
    """

    _VALID_DICT_FIELDS: ClassVar[tuple[str, ...]] = (
        "accelerator_config",
        "fsdp_config",
        "deepspeed",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing_kwargs",
        "liger_kernel_config",
        "lr_scheduler_kwargs",
    )

    def __post_init__(self) -> None:
        """Convert values to the declared types, fill derived defaults, and check all arguments."""
        self.validate()

    def _validate(self) -> None:
        self._forget_masks()
        unread = self._read_values()
        # A value that cannot be read is replaced by its default for the check of other values, so
        # that one error lists all problems.
        for name in unread:
            vars(self)[name] = default_of(_field(self, name))
        found = [p for p in self._check_values() if not _names_any(p, unread)]
        raise_problems([*unread.values(), *found], error=ConfigError)

    def _read_values(self) -> dict[str, Problem]:
        """Convert all fields in place; return field -> problem, for values that cannot be read."""
        early = {
            "torch_empty_cache_steps": self._read_cache_steps(),
            "accelerator_config": self._read_accelerator_config(),
        }
        self._spell()
        unread = {name: problem for name, problem in early.items() if problem is not None}
        unread |= coerce_fields(self)
        # DeepSpeed's config is read by the resolution; a config of FSDP is refused.
        dicts = [n for n in self._VALID_DICT_FIELDS if n not in ("deepspeed", "fsdp_config")]
        unread |= read_dicts(self, tuple(name for name in dicts if name not in unread))
        if self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {}
        return unread

    def _check_values(self) -> list[Problem]:
        """Fill derived values; return the problems of refused and contradictory values."""
        self._join_twins()
        moved, problems = enforce.move_old_names(self)
        problems += convert_values(type(self), {name: getattr(self, name) for name in moved})[1]
        problems += enforce.refusals(self)
        self._fill()
        return problems + self._problems()

    def _spell(self) -> None:
        """Replace values in other documented or common forms by their usual form."""
        if self.output_dir is None:
            self.output_dir = default_of(_field(self, "output_dir"))
        if self.include_num_input_tokens_seen is None:
            self.include_num_input_tokens_seen = "no"
        if isinstance(self.zero_stage, int) and not isinstance(self.zero_stage, bool):
            self.zero_stage = str(self.zero_stage)
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        if isinstance(self.report_to, (list, tuple)) and list(self.report_to) == ["none"]:
            self.report_to = []
        if isinstance(self.debug, str) or self.debug is None:
            self.debug = (self.debug or "").split()
        elif isinstance(self.debug, (list, tuple)):
            self.debug = [part for v in self.debug for part in str(getattr(v, "value", v)).split()]
        if isinstance(self.fsdp, bool) or self.fsdp is None:
            self.fsdp = "full_shard" if self.fsdp else ""
        if isinstance(self.fsdp, (list, tuple)):
            self.fsdp = " ".join(str(getattr(v, "value", v)) for v in self.fsdp)

    def _fill(self) -> None:
        """Fill values that follow from other arguments."""
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.eval_strategy != "no":
            self.do_eval = True
        if self.lr_scheduler_type in WITHOUT_WARMUP and (self.warmup_steps or self.warmup_ratio):
            enforce.warn(
                f"lr_scheduler_type={self.lr_scheduler_type!r} has no warm-up: warmup_steps and "
                "warmup_ratio have no effect",
                UserWarning,
            )
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps
        for name in _STEPS:
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():
                setattr(self, name, int(value))  # as scripts use them: range(args.save_steps)
        self.include_num_input_tokens_seen = self.counts_tokens
        self.debug = [Choice(option) for option in self.debug]
        for name in _LIKE_ENUMS:
            setattr(self, name, Choice(getattr(self, name)))
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            self.torch_compile = True
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
        self._fill_best_metric(
            needed=bool(self.load_best_model_at_end)
            or self.save_strategy == "best"
            or self.lr_scheduler_type in METRIC_SCHEDULERS
        )

    def _problems(self) -> list[Problem]:
        return [
            *self._run_problems(),
            *self._batch_problems(),
            *self._data_problems(),
            *self._optimizer_problems(),
            *self._precision_problems(),
            *self._zero_problems(),
            *self._offload_problems(self.zero_stage),
            *self._communication_problems(),
            *self._feature_problems(),
            *self._evaluation_problems(self.lr_scheduler_type),
            *self._saving_problems(self.eval_strategy, self.eval_steps),
            *self._reporting_problems(),
        ]

    def changed_fields(self) -> frozenset[str]:
        """Return the names of the fields whose value differs from the documented default."""
        return frozenset(
            f.name for f in dataclasses.fields(self) if getattr(self, f.name) != default_of(f)
        )

    @property
    def train_batch_size(self) -> int:
        """Return the micro-batch of this process (a process drives one device)."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Return the evaluation batch of this process (a process drives one device)."""
        return self.per_device_eval_batch_size


def _field(arguments: TrainingArguments, name: str) -> dataclasses.Field[object]:
    return next(f for f in dataclasses.fields(arguments) if f.name == name)


def _names_any(problem: Problem, names: Iterable[str]) -> bool:
    """Tell whether a problem names one of the arguments, which are replaced by their default."""
    text = f"{problem.what} {problem.why}"
    return any(re.search(rf"\b{name}\b", text) for name in names)
