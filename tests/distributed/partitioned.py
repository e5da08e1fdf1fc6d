"""Building, saving and training small models in `dstrain.partitioned`, for tests of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dstrain.core.ranks import barrier
from tests.distributed.runs import make_trainer

VISION_LANGUAGE = [
    f"{name}ForConditionalGeneration" for name in ("Llava", "Gemma3", "Gemma4", "Qwen2VL")
]
MERGED = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"]


def tiny(name: str, **overrides: Any) -> Any:
    """Return a whole tiny model of transformers, always with the same weights."""
    import transformers

    from tests.families.tiny import build

    return build(getattr(transformers, name), **overrides)


def saved_by_one(model: Any, folder: Path, rank: int) -> Path:
    """Save a whole model with ``save_pretrained``, on the first rank."""
    if rank == 0:
        model.save_pretrained(folder)
    barrier()
    return folder


def block(folder: Path, **settings: Any) -> Any:
    """Return ``partitioned(args)`` at stage 3."""
    import dstrain
    from dstrain import TrainingArguments

    return dstrain.partitioned(
        TrainingArguments(str(folder), zero_stage="3", report_to="none", **settings)
    )


def assert_partitioned(model: torch.nn.Module) -> None:
    """Check that every parameter is partitioned, and that none is whole at this moment."""
    from dstrain.engine import is_partitioned

    assert all(is_partitioned(p) and p.numel() == 0 for p in model.parameters())


def trained(folder: Path, model: Any, *, stage: int, **settings: Any) -> Any:
    """Train two steps on texts and save a checkpoint; return the trainer."""
    from tests.models import RaggedTokens

    data = RaggedTokens(8)
    for example in data.examples:  # below the tiny vocabulary and its ids of images
        example["input_ids"] = [3 + token % 50 for token in example["input_ids"]]
        example["labels"] = [t if t < 0 else 3 + t % 50 for t in example["labels"]]
    trainer = make_trainer(
        folder, stage=stage, model=model, data=data, evaluation=0, max_steps=2,
        save_strategy="steps", save_steps=2, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer
