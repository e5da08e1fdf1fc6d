"""A small corpus and the flags of a model that learns something of it in seconds."""

from __future__ import annotations

import random
from pathlib import Path

TINY_MODEL = (
    "llama:hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2"
)
WORDS = [
    "def",
    "return",
    "class",
    "import",
    "lambda",
    "yield",
    "self",
    "value",
    "index",
    "name",
    "for",
    "while",
    "pass",
    "None",
]


def text(seed: int, num_lines: int = 60) -> str:
    """Make lines of words, always the same ones for a seed."""
    draw = random.Random(seed)
    return "".join(f"    {' '.join(draw.choices(WORDS, k=6))}\n" for _ in range(num_lines))


def write_corpus(folder: Path, num_files: int = 8) -> Path:
    """Write a folder of text files."""
    folder.mkdir(parents=True)
    for seed in range(num_files):
        (folder / f"part{seed}.txt").write_text(text(seed))
    return folder


def flags(output_dir: Path | str, /, **given: object) -> list[str]:
    """Make the flags of a tiny run; ``given`` adds or replaces some, None removes one."""
    values: dict[str, object] = {
        "output_dir": output_dir,
        "model_config": TINY_MODEL,
        "vocab_size": 300,
        "block_size": 32,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "completion_tokens": 8,
        "report_to": "none",
    }
    values |= given
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]
