"""``dstrain explain``: the config that flags resolve to, and why; no torch, no GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dstrain.arguments import TrainingArguments
from dstrain.cli.flags import make_parser, parse
from dstrain.config import Facts, resolve
from dstrain.config.explain import as_dict, as_table
from dstrain.core.errors import ConfigError, Problem


def run(words: Sequence[str]) -> int:
    """Resolve and print.

    Raises:
        ConfigError: as training with these flags would.
    """
    classes = [TrainingArguments]
    parser = make_parser(
        "dstrain explain",
        "Print the DeepSpeed config that training with these flags would use, and why.",
        classes,
    )
    world = parser.add_argument_group("The world to explain for")
    world.add_argument("--world_size", type=int, default=1, help="ranks over all machines")
    world.add_argument("--device", default="cuda", help="cuda or cpu")
    world.add_argument("--json", action="store_true", default=False, help="print JSON")
    options, (arguments,) = parse(parser, words, classes)
    if options.world_size < 1:
        raise ConfigError(Problem(f"--world_size {options.world_size}", "at least one rank"))
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    resolved = resolve(
        arguments,
        Facts(world_size=options.world_size, device=options.device, num_training_steps=steps),
    )
    if options.json:
        print(json.dumps(as_dict(resolved), indent=2, default=str))
    else:
        print(as_table(resolved))
    return 0
