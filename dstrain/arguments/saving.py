"""Arguments about checkpoints: times, number, content, resuming, and the best model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import implemented, no_effect
from dstrain.core.errors import Problem

# Shares of all steps are rounded by their writers: 0.3 is three times 0.1 in this measure.
_ROUNDING = 1e-9


@dataclass
class SavingArguments:
    """Checkpoints during training, resuming, and the best model."""

    save_strategy: str = arg(
        "steps",
        "Write a checkpoint never, every save_steps, after each epoch, or when the metric is best.",
        choices=("no", "steps", "epoch", "best"),
        treatment=implemented(),
    )
    save_steps: float = arg(
        500,
        "Optimizer steps between two checkpoints; below 1 it is a share of all steps, and 0 saves "
        "after the last step alone.",
        treatment=implemented(),
    )
    save_total_limit: int | None = arg(
        None,
        "Checkpoints to keep, the newest and the best among them whatever it is; none or 0 keeps "
        "all.",
        treatment=implemented(),
    )
    save_safetensors: bool | None = arg(
        True,
        "Write weights as safetensors instead of pickles.",
        treatment=no_effect("weights are always safetensors, as in transformers 5"),
    )
    save_on_each_node: bool = arg(
        False,
        "Write models and checkpoints on every machine, for machines without a shared disk.",
        treatment=implemented(
            "each machine has its own ranks' part of what a resume needs, and all of the rest"
        ),
    )
    save_only_model: bool = arg(
        False,
        "Leave optimizer, schedule and random state out of checkpoints.",
        treatment=implemented("training cannot be resumed from them"),
    )
    save_weights_with_checkpoint: bool = arg(
        True,
        "Write the model into checkpoints as a Hugging Face folder too, so that from_pretrained "
        "reads them.",
        treatment=implemented(own=True),
    )
    save_async: bool | None = arg(
        None,
        "Write checkpoints beside training, which then waits only for a copy to host memory; none "
        "decides by the memory that is left. That memory, a rank's share of weights and optimizer "
        "state, is kept between saves until training ends. State that is offloaded to nvme is "
        "copied on that disk, and only with true.",
        treatment=implemented(own=True),
    )
    save_failure: str = arg(
        "stop",
        "Reaction to a checkpoint that could not be written: 'stop' ends the run with an error, "
        "'continue' logs it, trains on, and lists missing checkpoints at the end (exit status 3 "
        "if the last is missing); earlier checkpoints stay in both cases.",
        choices=("stop", "continue"),
        treatment=implemented(own=True),
    )
    checkpoint_format: str = arg(
        "dstrain",
        "'dstrain' goes on at any number of ranks and ZeRO stage and reads no pickle; 'deepspeed' "
        "writes DeepSpeed's own files, which only the same ranks, stage and format read again, "
        "and reading them executes the pickles in them: for checkpoints that you trust.",
        choices=("dstrain", "deepspeed"),
        treatment=implemented(own=True),
    )
    preemption: str = arg(
        "exit",
        "Reaction of training to SIGTERM, SIGUSR1 or SIGHUP on any rank, or Ctrl-C of a launcher: "
        "'exit' saves a checkpoint after the step, whatever save_strategy is, and ends the process "
        "with status 75 (before the first step, where there is nothing to save, 128 + signal); "
        "'return' saves and lets train() return, with trainer.preempted set; "
        "'ignore' leaves the signals alone.",
        choices=("exit", "return", "ignore"),
        treatment=implemented(
            "all ranks stop after the same step, at most about a second and two steps later; "
            "or between the same batches of an evaluation, which a resume then does first of all",
            own=True,
        ),
    )
    enable_jit_checkpoint: bool = arg(
        False,
        "Save a checkpoint when SIGTERM asks the run to end.",
        treatment=implemented("`preemption` does it unless it is 'ignore'", own=True),
    )
    restore_callback_states_from_checkpoint: bool = arg(
        False,
        "Restore the callbacks' states when training resumes.",
        treatment=implemented(),
    )
    resume_from_checkpoint: str | None = arg(
        None,
        "Checkpoint folder from which to go on; 'true' for the newest in output_dir, 'auto' for "
        "that or a fresh start.",
        treatment=implemented("used where train() is called without one"),
    )
    load_best_model_at_end: bool | None = arg(
        False,
        "Load the weights of the best checkpoint after training.",
        treatment=implemented("weights alone, at every ZeRO stage"),
    )
    metric_for_best_model: str | None = arg(
        None,
        "Metric that decides which checkpoint is best, with or without 'eval_' before it; none "
        "takes loss.",
        treatment=implemented("an evaluation without it is an error that lists what it has"),
    )
    greater_is_better: bool | None = arg(
        None,
        "Higher values of that metric are better; none says yes unless its name ends in loss.",
        treatment=implemented(),
    )

    def _fill_best_metric(self, *, needed: bool) -> None:
        """Fill the documented defaults of the metric, if ``needed``, and of its direction."""
        if needed and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")

    def _saving_problems(self, eval_strategy: str, eval_steps: float | None) -> list[Problem]:
        problems = []
        if self.save_strategy == "steps" and self.save_steps < 0:
            problems.append(
                Problem(
                    f"save_steps={self.save_steps} with save_strategy='steps'",
                    "a number of steps, or a share of all steps, is needed",
                    "set save_strategy to no to write no checkpoint",
                )
            )
        if self.save_steps > 1 and not float(self.save_steps).is_integer():
            problems.append(
                Problem(f"save_steps={self.save_steps}", "above 1 it must be a whole number")
            )
        if self.enable_jit_checkpoint and self.preemption == "ignore":
            problems.append(
                Problem(
                    "enable_jit_checkpoint=True with preemption='ignore'",
                    "one saves when a signal asks the run to end, the other leaves signals alone",
                    "set preemption to exit or return, or leave enable_jit_checkpoint out",
                )
            )
        if self.save_on_each_node and self.checkpoint_format == "deepspeed":
            problems.append(
                Problem(
                    "save_on_each_node=True with checkpoint_format='deepspeed'",
                    "DeepSpeed reads and writes the files of all ranks in one folder",
                    "use a disk that all machines share, or leave checkpoint_format out",
                )
            )
        if self.save_strategy == "best" and eval_strategy == "no":
            problems.append(
                Problem(
                    "save_strategy='best' with eval_strategy='no'",
                    "only an evaluation finds out which checkpoint is best",
                    "set eval_strategy to steps or epoch",
                )
            )
        if self.checkpoint_format == "deepspeed" and self.save_async:
            problems.append(
                Problem(
                    "save_async=True with checkpoint_format='deepspeed'",
                    "DeepSpeed writes its own files while training waits",
                    "leave save_async out, or use checkpoint_format='dstrain'",
                )
            )
        if self.load_best_model_at_end and self.save_strategy != "best":
            problems += self._best_problems(eval_strategy, eval_steps)
        return problems

    def _best_problems(self, eval_strategy: str, eval_steps: float | None) -> list[Problem]:
        """Return the problem of settings by which some checkpoints have no evaluation."""
        if eval_strategy != self.save_strategy:
            return [
                Problem(
                    f"load_best_model_at_end=True with eval_strategy={eval_strategy!r} and "
                    f"save_strategy={self.save_strategy!r}",
                    "every checkpoint needs an evaluation of its own",
                    "make the two strategies equal, or set save_strategy to best",
                )
            ]
        if eval_strategy != "steps" or not eval_steps or self.save_steps <= 0:
            return []
        what = f"save_steps={self.save_steps} and eval_steps={eval_steps}"
        remedy = "make save_steps a multiple of eval_steps"
        if (eval_steps < 1) != (self.save_steps < 1):
            return [
                Problem(
                    f"load_best_model_at_end=True with {what}",
                    "one is a number of steps and the other a share of all steps",
                    remedy,
                )
            ]
        if not _is_multiple(self.save_steps, eval_steps):
            return [
                Problem(
                    f"load_best_model_at_end=True with {what}",
                    "some checkpoints would have no evaluation of their own",
                    remedy,
                )
            ]
        return []


def _is_multiple(number: float, of: float) -> bool:
    """Tell whether a positive number, or share, of steps is a multiple of ``of``."""
    rest = abs(math.remainder(number, of))
    return number > of / 2 and rest <= _ROUNDING * of
