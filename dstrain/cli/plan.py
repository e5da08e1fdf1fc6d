"""Command ``dstrain plan``: print the memory of each ZeRO stage and offload; without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dstrain.cli.flags import make_parser, parse
from dstrain.cli.model import count_in_child
from dstrain.config import optimizers
from dstrain.config.memory.activations import ATTENTION, Batch
from dstrain.config.memory.closed_forms import sizes_of
from dstrain.config.memory.placement import WIDTHS, Work, parse_size
from dstrain.config.memory.planner import Limits, fastest_choice, plan
from dstrain.config.memory.report import as_dict, as_table
from dstrain.core.errors import ConfigError, Problem, raise_problems


def run(words: Sequence[str]) -> int:
    """Print the memory plan of the model and machines that the flags describe.

    Raises:
        ConfigError: flags are unknown or have wrong values.
        ModelError: the model config cannot be read.
    """
    parser = make_parser(
        "dstrain plan",
        "Print the memory that every ZeRO stage and offload needs, and which one fits.",
        [],
    )
    model = parser.add_argument_group("Model")
    model.add_argument(
        "--model_config", default="", metavar="SPEC", help="config.json, or llama:key=value,..."
    )
    model.add_argument("--precision", default="bf16", help=f"{', '.join(WIDTHS)}")
    model.add_argument("--optimizer", default="adamw", help="a value of optim, or sgd_momentum")
    batch = parser.add_argument_group("Micro-batch")
    batch.add_argument("--seq_len", type=int, default=4096, help="tokens")
    batch.add_argument("--micro_batch", type=int, default=1, help="sequences")
    batch.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches")
    batch.add_argument(
        "--gradient_checkpointing", action="store_true", default=False, help="recompute layers"
    )
    batch.add_argument("--attention", default="sdpa", help=f"{', '.join(ATTENTION)}")
    world = parser.add_argument_group("Machines")
    world.add_argument("--gpus", type=int, default=1, help="over all machines")
    world.add_argument("--gpus_per_node", type=int, default=8, help="of one machine")
    world.add_argument("--gpu_memory", default="80GB", help="of one GPU")
    world.add_argument("--host_memory", default="", help="of one machine, such as 1TB")
    world.add_argument("--nvme", default="", help="local disk of one machine, such as 7TB")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    options, _ = parse(parser, words, [])
    _check(options)
    found = plan(
        sizes_of(options.model_config, count_in_child),
        Work(
            world_size=options.gpus,
            ranks_per_machine=min(options.gpus, options.gpus_per_node),
            precision=options.precision,
            accumulation=options.gradient_accumulation_steps,
            optimizer=options.optimizer,
            adam_temporary=optimizers.is_torch_adam(options.optimizer),
        ),
        Batch(
            options.micro_batch,
            options.seq_len,
            WIDTHS[options.precision],
            options.attention,
            options.gradient_checkpointing,
        ),
        Limits(
            parse_size(options.gpu_memory, "gpu_memory"),
            parse_size(options.host_memory, "host_memory") if options.host_memory else None,
            parse_size(options.nvme, "nvme") if options.nvme else None,
        ),
    )
    choice = fastest_choice(found)
    if options.json:
        print(json.dumps(as_dict(found, choice), indent=2))
    else:
        print(as_table(found, choice))
    return 0


def _check(options: object) -> None:
    problems = []
    if not getattr(options, "model_config", None):
        problems.append(
            Problem("--model_config is missing", "", "for example --model_config config.json")
        )
    for name in ("gpus", "gpus_per_node", "seq_len", "micro_batch", "gradient_accumulation_steps"):
        if (value := getattr(options, name)) < 1:
            problems.append(Problem(f"--{name} {value}", "at least one"))
    known = {"precision": WIDTHS, "optimizer": optimizers.planned_names(), "attention": ATTENTION}
    for name, values in known.items():
        if (value := getattr(options, name)) not in values:
            problems.append(Problem(f"--{name} {value}", f"one of {', '.join(values)}"))
    raise_problems(problems, error=ConfigError)
