"""Arguments about logging and reporting."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import implemented
from dstrain.core.errors import Problem, nearest
from dstrain.core.files import check_utf8

_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")


@dataclass
class ReportingArguments:
    """Logs and trackers: their times and content."""

    logging_strategy: str = arg(
        "steps",
        "Log never, every logging_steps, or after each epoch.",
        choices=("no", "steps", "epoch"),
        treatment=implemented(),
    )
    logging_steps: float = arg(
        500,
        "Optimizer steps between two logs; below 1 it is a share of all steps.",
        treatment=implemented(),
    )
    logging_first_step: bool = arg(False, "Log the first step too.", treatment=implemented())
    logging_nan_inf_filter: bool = arg(
        True,
        "Leave NaN and infinite losses out of the logged mean. Gradients are not touched, and the "
        "nan_loss argument still acts on them.",
        treatment=implemented(),
    )
    logging_dir: str | None = arg(
        None,
        "TensorBoard folder; none takes output_dir/runs/<date>_<host>.",
        treatment=implemented("handed to the TensorBoard callback"),
    )
    report_to: list[str] | None = arg(
        None,
        "Trackers, such as tensorboard or wandb; 'all' or none takes every installed one, 'none' "
        "no one.",
        treatment=implemented(),
    )
    run_name: str | None = arg(
        None, "Name of the run in trackers; none leaves it to the tracker.", treatment=implemented()
    )
    disable_tqdm: bool | None = arg(
        None,
        "Print log lines instead of progress bars; none decides by the log level.",
        treatment=implemented(),
    )
    log_level: str = arg(
        "passive",
        "Log level of the main rank; passive keeps the current one.",
        choices=_LEVELS,
        treatment=implemented(),
    )
    log_level_replica: str = arg(
        "warning", "Log level of all other ranks.", choices=_LEVELS, treatment=implemented()
    )
    log_on_each_node: bool = arg(
        True,
        "Let the first rank of every machine log as a main rank.",
        treatment=implemented(),
    )
    include_tokens_per_second: bool | None = arg(
        False,
        "Log the training speed in tokens.",
        treatment=implemented("logged in any case, from a running count and without a pre-pass"),
    )
    include_num_input_tokens_seen: str | bool = arg(
        "no",
        "Log the number of input tokens seen so far: 'all' (true), 'non_padding' leaves padding "
        "out, 'no' (false).",
        choices=(False, True, "no", "all", "non_padding"),
        treatment=implemented("counted in host memory, added up over ranks when logged"),
    )
    skip_memory_metrics: bool = arg(
        True,
        "Leave memory figures out of the metrics.",
        treatment=implemented(),
    )
    debug: list[str] = arg(
        [],
        "Debug features: underflow_overflow, tpu_metrics_debug.",
        treatment=implemented(
            "slow: every layer is searched for NaN and infinity",
            excluded={"tpu_metrics_debug": "DeepSpeed does not train on TPUs"},
        ),
    )

    @property
    def counts_tokens(self) -> str:
        """Return ``include_num_input_tokens_seen`` as "no", "all" or "non_padding"."""
        given = self.include_num_input_tokens_seen
        # A script may have assigned a bool after the check of the arguments.
        return given if isinstance(given, str) else "all" if given else "no"

    def _reporting_problems(self) -> list[Problem]:
        problems = check_utf8("logging_dir", self.logging_dir)
        for option in self.debug:
            if option == "tpu_metrics_debug":
                problems.append(Problem(f"debug={option!r}", "DeepSpeed does not train on TPUs"))
            elif option not in _DEBUG:
                close = nearest(option, set(_DEBUG))
                problems.append(
                    Problem(
                        f"debug={option!r}",
                        f"{option!r} is none of {', '.join(_DEBUG)}",
                        f"did you mean {close!r}?" if close else "",
                    )
                )
        if self.logging_strategy == "steps" and self.logging_steps <= 0:
            problems.append(
                Problem(
                    f"logging_steps={self.logging_steps} with logging_strategy='steps'",
                    "a positive number of steps, or a share of all steps, is needed",
                    "set logging_strategy to no to log nothing",
                )
            )
        if self.logging_steps > 1 and not float(self.logging_steps).is_integer():
            problems.append(
                Problem(f"logging_steps={self.logging_steps}", "above 1 it must be a whole number")
            )
        return problems
