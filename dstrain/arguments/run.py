"""Arguments about the run as a whole: output folder, seeds, device, start-up, errors."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import alias, implemented, stored
from dstrain.core.errors import Problem
from dstrain.core.files import check_utf8


@dataclass
class RunArguments:
    """Output folder, seeds, device and distributed start-up."""

    output_dir: str = arg(
        "trainer_output",
        "Folder for the model, metrics and records of the run.",
        treatment=implemented("none is the default too; `~` is expanded"),
    )
    overwrite_output_dir: bool = arg(
        False,
        "Let a script write into a folder that is not empty.",
        treatment=stored("files of the same name are always written over"),
    )
    do_train: bool = arg(
        False,
        "Train, in a script; stored only, for scripts to read.",
        treatment=stored(),
    )
    do_eval: bool = arg(
        False,
        "Evaluate, in a script; set when eval_strategy is not 'no'.",
        treatment=stored("set where `eval_strategy` is not 'no'"),
    )
    do_predict: bool = arg(
        False,
        "Predict, in a script; stored only, for scripts to read.",
        treatment=stored(),
    )
    seed: int = arg(
        42, "Seed of model initialisation, data order and noise.", treatment=implemented()
    )
    data_seed: int | None = arg(
        None, "Seed of the data order alone; none takes `seed`.", treatment=implemented()
    )
    full_determinism: bool = arg(
        False,
        "Use deterministic kernels everywhere, at the cost of speed.",
        treatment=implemented("for the rest of the process; what has no such kernel is an error"),
    )
    use_cpu: bool = arg(
        False,
        "Run on the CPU (gloo) even where there is an accelerator.",
        treatment=implemented("turns `dataloader_pin_memory` off too"),
    )
    no_cuda: bool = arg(False, "Old name of use_cpu.", treatment=alias("use_cpu"))
    local_rank: int = arg(
        -1,
        "Set by launchers; the environment's LOCAL_RANK wins over it.",
        treatment=implemented("launchers set it; the environment's LOCAL_RANK is what counts"),
    )
    ddp_backend: str | None = arg(
        None,
        "Communication backend; none takes the device's own (nccl on CUDA, gloo on the CPU).",
        choices=("nccl", "gloo", "mpi", "ccl", "hccl"),
        treatment=implemented("`dist_backend` of `deepspeed.init_distributed`"),
    )
    ddp_timeout: int = arg(
        1800,
        "Seconds that a collective waits for a missing rank.",
        treatment=implemented(
            "`timeout` of `deepspeed.init_distributed`; in a training step the run then ends with "
            "status 76 and the name of that rank"
        ),
    )
    ray_scope: str | None = arg(
        "last",
        "Result of a Ray trial that counts in a hyperparameter search.",
        treatment=implemented("of `hyperparameter_search`"),
    )
    nan_loss: str = arg(
        "stop",
        "Reaction to a NaN or infinite training loss at a logging step, and outside of fp16 to a "
        "step that is skipped because gradients are not finite: 'stop' ends the run with an error "
        "that names the first such step, 'continue' warns and goes on.",
        choices=("stop", "continue"),
        treatment=implemented(own=True),
    )

    def _run_problems(self) -> list[Problem]:
        problems = []
        if not self.output_dir.strip():
            problems.append(
                Problem(
                    f"output_dir={self.output_dir!r}",
                    "a run writes into a folder of its own, and this names none",
                    "name one, or leave it out for trainer_output; is a shell variable empty?",
                )
            )
        problems += check_utf8("output_dir", self.output_dir)
        if self.ddp_timeout <= 0:
            problems.append(
                Problem(f"ddp_timeout={self.ddp_timeout}", "seconds, so greater than 0")
            )
        return problems
