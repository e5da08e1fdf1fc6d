"""Arguments about the run as a whole: where it writes, what it repeats, what ends it."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.core.errors import Problem


@dataclass
class RunArguments:
    """Output folder, seeds, device and distributed start-up."""

    output_dir: str = arg("trainer_output", "Folder for the model, metrics and records of the run.")
    do_train: bool = arg(False, "Whether a script should train; stored only, for scripts to read.")
    do_eval: bool = arg(
        False, "Whether a script should evaluate; set when eval_strategy is not 'no'."
    )
    do_predict: bool = arg(
        False, "Whether a script should predict; stored only, for scripts to read."
    )
    seed: int = arg(42, "Seed of model initialisation, data order and noise.")
    data_seed: int | None = arg(None, "Seed of the data order alone; none takes `seed`.")
    use_cpu: bool = arg(False, "Run on the CPU (gloo) even where there is an accelerator.")
    local_rank: int = arg(-1, "Set by launchers; the environment's LOCAL_RANK wins over it.")
    ddp_backend: str | None = arg(
        None,
        "Communication backend; none takes the device's own (nccl on CUDA, gloo on the CPU).",
        choices=("nccl", "gloo", "mpi", "ccl", "hccl"),
    )
    ddp_timeout: int = arg(1800, "Seconds that a collective waits for a missing rank.")
    nan_loss: str = arg(
        "stop",
        "What a NaN or infinite training loss does once a logging step has seen it: 'stop' ends "
        "the run with an error that names the first such step, 'continue' warns and goes on.",
        choices=("stop", "continue"),
    )

    def _run_problems(self) -> list[Problem]:
        problems = []
        if self.ddp_timeout <= 0:
            problems.append(
                Problem(f"ddp_timeout={self.ddp_timeout}", "seconds, so greater than 0")
            )
        return problems
