"""The other side of every comparison: training with DeepSpeed as one writes it by hand.

`plain_steps` is the loop of DeepSpeed's own tutorial. `weighted_steps` is what it takes to have
dstrain's loss (the mean over all targets of the global batch) by hand.

As a script it trains a small model on a text and prints each step's loss, for `startup.py`:

    python benchmarks/hand_written.py text.txt
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

IGNORED = -100

# What a llama needs beyond its vocabulary. Parameters with 4096 tokens: 0.5, 5, 110, 1100 million.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "heads": 4},
    "base": {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 11, "heads": 14},
    "large": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 21, "heads": 16},
}


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Token blocks of one length, every token of which is a target."""

    def __init__(self, tokens: torch.Tensor) -> None:
        """Keep the blocks: int64 tokens, shape (blocks, block size)."""
        self.tokens = tokens

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return block ``index`` as model inputs."""
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def build_model(name: str, *, vocab_size: int, block_size: int, seed: int = 42) -> Any:
    """Return a llama with fresh fp32 weights, whole on every rank, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(MODELS[name])
    heads = sizes.pop("heads")
    torch.manual_seed(seed)
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def build_engine(model: Any, config: dict[str, Any], *, num_steps: int) -> Any:
    """Return a DeepSpeed engine whose learning rate falls to zero over ``num_steps``."""
    import deepspeed
    from transformers import get_linear_schedule_with_warmup

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 0, num_steps),
    )
    engine.train()
    return engine


def build_loader(
    dataset: Dataset[Any], indices: Sequence[int], *, micro_batch: int, pin_memory: bool
) -> DataLoader[Any]:
    """Return a loader of one rank: the samples ``indices``, in that order."""
    return DataLoader(dataset, batch_size=micro_batch, sampler=indices, pin_memory=pin_memory)


def plain_steps(engine: Any, loader: DataLoader[Any], accumulation: int) -> Iterator[torch.Tensor]:
    """Train; yields each optimizer step's mean of the micro-batches' mean losses, on the device."""
    batches = iter(loader)
    while True:
        total = torch.zeros((), device=engine.device)
        for _ in range(accumulation):
            batch = next(batches, None)
            if batch is None:
                return
            batch = {k: v.to(engine.device, non_blocking=True) for k, v in batch.items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        yield total / accumulation


def weighted_steps(
    engine: Any, loader: DataLoader[Any], accumulation: int
) -> Iterator[torch.Tensor]:
    """Train on the mean over all targets of the global batch; yields this rank's share of it."""
    batches = iter(loader)
    world_size = dist.get_world_size()
    while True:
        window = [batch for _ in range(accumulation) if (batch := next(batches, None)) is not None]
        if len(window) < accumulation:
            return
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in window]
        targets = torch.tensor(float(sum(counts)), device=engine.device)
        dist.all_reduce(targets)
        total = torch.zeros((), device=engine.device)
        for batch, count in zip(window, counts, strict=True):
            batch = {k: v.to(engine.device, non_blocking=True) for k, v in batch.items()}
            loss = engine(**batch).loss
            engine.backward(loss * (count * world_size / targets), scale_wrt_gas=False)
            engine.step()
            total += loss.detach() * (count / targets)
        yield total


STEPS = {"plain": plain_steps, "weighted": weighted_steps}


def main() -> None:
    """Train four steps on the bytes of a text, as `startup.py` asks of dstrain too."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed()
    block_size, micro_batch, num_steps = 128, 4, 4
    tokens = torch.tensor(list(Path(sys.argv[1]).read_bytes()))
    blocks = Blocks(tokens[: len(tokens) // block_size * block_size].view(-1, block_size))
    model = build_model("tiny", vocab_size=512, block_size=block_size)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine = build_engine(model, config, num_steps=num_steps)
    mine = range(dist.get_rank(), len(blocks), dist.get_world_size())
    loader = build_loader(blocks, mine, micro_batch=micro_batch, pin_memory=False)
    for step, loss in zip(range(1, num_steps + 1), plain_steps(engine, loader, 1), strict=False):
        print(f"step {step}  loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
