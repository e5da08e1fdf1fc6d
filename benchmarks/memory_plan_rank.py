"""One rank of `memory_plan.py`: trains a few steps and says what memory that took."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

MEASURED_STEPS = 2
SETTLING_STEPS = 3  # optimizer states, stage 3's trace of the modules, thread pools


def main() -> None:
    """Measure one run; rank 0 writes the largest of all ranks."""
    settings = json.loads(sys.argv[1])
    import torch

    cuda = torch.cuda.is_available() and settings["device"] != "cpu"
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Loads ops and warms up: the matrix libraries keep buffers of their own for each shape.
    _train({**settings, "model": {**settings["model"], "num_hidden_layers": 1}}, cuda)
    meter = CudaMeter() if cuda else ProcessMeter()
    result = _train(settings, cuda, meter)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    if dist.get_rank() == 0:
        largest = {key: max(r[key] for r in gathered) for key in result}
        Path(settings["result"]).write_text(json.dumps(largest))
    dist.barrier()
    dist.destroy_process_group()


class ProcessMeter:
    """Memory of this process: anonymous pages, and the most resident ones since a reset."""

    def __init__(self) -> None:
        """Take what is there now as nothing."""
        self._settle()
        self._base = self._read("RssAnon")
        self._base_resident = self._read("VmRSS")

    def now(self) -> int:
        """Return bytes in use once what was freed has gone back to the system."""
        self._settle()
        return self._read("RssAnon") - self._base

    def reset_peak(self) -> None:
        """Begin to look for the peak."""
        self._settle()
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the most bytes in use since ``reset_peak``, without file pages from before."""
        return self._read("VmHWM") - self._base_resident

    @staticmethod
    def _settle() -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    @staticmethod
    def _read(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)


class CudaMeter:
    """Memory of the caching allocator."""

    def __init__(self) -> None:
        """Take what is there now as nothing."""
        import torch

        self._cuda = torch.cuda
        gc.collect()
        self._base = self._cuda.memory_allocated()

    def now(self) -> int:
        """Return bytes in use."""
        gc.collect()
        return self._cuda.memory_allocated() - self._base

    def reset_peak(self) -> None:
        """Begin to look for the peak."""
        self._cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the most bytes in use since ``reset_peak``."""
        return self._cuda.max_memory_allocated() - self._base


def _train(settings: dict[str, Any], cuda: bool, meter: Any = None) -> dict[str, int]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dstrain import TrainingArguments
    from dstrain.config import Facts, resolve
    from dstrain.engine import BuildRegistration, Engine, model_facts, parameter_groups

    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings["precision"]]
    config = LlamaConfig(**settings["model"], tie_word_embeddings=False)
    config._attn_implementation = settings["attention"]
    arguments = TrainingArguments(
        output_dir="unused",
        deepspeed=settings["config"],
        zero_stage=str(settings["stage"]),
        offload_optimizer=settings["optimizer"],
        offload_param=settings["parameters"],
        bf16=settings["precision"] == "bf16",
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["accumulation"],
        report_to=["none"],
    )
    with torch.device("meta"):
        facts = model_facts(LlamaForCausalLM(config))
    resolved = resolve(
        arguments,
        Facts(int(os.environ["WORLD_SIZE"]), "cuda" if cuda else "cpu", 100, facts),
    )
    mark = BuildRegistration(resolved)
    if meter is not None:
        meter.reset_peak()
    module = LlamaForCausalLM._from_config(config, dtype=dtype)
    mark.close()
    if settings["checkpointing"]:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    engine = Engine(module, resolved, groups=parameter_groups(module, weight_decay=0.1))
    built = meter.peak() if meter is not None else 0
    engine.model.train()
    shape = (settings["micro_batch"], settings["seq_len"])

    peaks = {"forward": 0, "backward": 0, "step": 0}

    def note(part: str) -> None:
        if meter is not None:
            peaks[part] = max(peaks[part], meter.peak())
            meter.reset_peak()

    def step() -> None:
        for index in range(settings["accumulation"]):
            tokens = torch.randint(0, config.vocab_size, shape, device=device)
            loss = engine.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            note("forward")
            engine.backward(loss, last=index == settings["accumulation"] - 1)
            note("backward")
        engine.step()
        note("step")

    for _ in range(SETTLING_STEPS if meter is not None else 1):
        step()
    states = 0
    if meter is not None:
        states = meter.now()
        peaks = dict.fromkeys(peaks, 0)
        meter.reset_peak()
        for _ in range(MEASURED_STEPS):
            step()
    engine.destroy()
    return {"built": built, "states": states, **peaks, "peak": max(peaks.values())}


if __name__ == "__main__":
    main()
