"""One rank of a run of `checkpoint.py`: trains and saves, or resumes, with clocks around it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint import Settings
from hand_written import Blocks

VOCAB_SIZE = 4096
SEED = 42
CHUNK_BYTES = 16 * 2**20
SAMPLE_SECONDS = 0.002


@dataclass
class Clocks:
    """Called by a trainer's callbacks; everything per step of this rank.

    Attributes:
        settings: of the run.
        gaps: step -> seconds from its end to the begin of the next: log, save, fetch a batch.
        ends: step -> when it ended.
        begins: step -> when it began.
        peaks: step at a window's end -> peak resident bytes since the last window's end.
    """

    settings: Settings
    gaps: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    begins: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)

    def step_begins(self, step: int) -> None:
        """Note that a step begins, after ``step`` steps."""
        now = time.perf_counter()
        self.begins[step + 1] = now
        if step in self.ends:
            self.gaps[step] = now - self.ends[step]

    def step_ends(self, step: int) -> None:
        """Note that the step has ended; whatever the trainer does after it follows."""
        if step == 2:  # what building the engine took is no cost of saving
            forget_peak()
        if step % self.settings.steps_between == 0:
            self.peaks[step] = status_bytes("VmHWM")
            forget_peak()
            dist.barrier()  # a save waits for the slowest rank, which is no cost of saving
        self.ends[step] = time.perf_counter()


def main() -> None:
    """Run; rank 0 writes the result."""
    settings = Settings(**json.loads(sys.argv[1]))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if settings.contender == "transformers" and not importlib.util.find_spec("accelerate"):
        raise SystemExit("accelerate is not installed: leave transformers out of --contenders")
    clocks = Clocks(settings)
    run = run_transformers if settings.contender == "transformers" else run_dstrain
    result = TASKS[settings.task](settings, clocks, run)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    if dist.get_rank() == 0:
        Path(settings.result).write_text(json.dumps(_slowest(gathered)))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without C++ destructors: now and then one ends a finished process with "terminate called
    # without an active exception" (why is not known), and the figures of all rounds with it.
    os._exit(0)


def _slowest(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, for every number of seconds or bytes, the largest over the ranks."""
    merged = dict(ranks[0])
    for name, value in merged.items():
        if name.endswith(("_seconds", "_bytes")):
            values = [rank[name] for rank in ranks]
            merged[name] = (
                [max(each) for each in zip(*values, strict=True)]
                if isinstance(value, list)
                else max(values)
            )
    return merged


# --- saving --------------------------------------------------------------------------------------


def save_task(settings: Settings, clocks: Clocks, run: Callable[..., Any]) -> dict[str, Any]:
    """Train with saves."""
    commits: list[float] = []
    with noted_commits(commits):
        trainer = run(settings, clocks)
    saved = [settings.steps_between * k for k in range(1, settings.saves + 1)]
    ordinary = statistics.median(
        gap for step, gap in clocks.gaps.items() if step > 2 and step not in saved
    )
    stalls = [clocks.gaps[step] - ordinary for step in saved]
    spans = {s: clocks.begins[s + 1] - clocks.begins[s] for s in clocks.gaps}
    # What else runs in the background slows steps: the whole window against one without a save.
    plain = statistics.median(spans[s] for s in spans if 2 < s < saved[0])
    windows = [range(s, s + settings.steps_between) for s in saved]
    costs = [sum(spans[s] for s in w) - len(w) * plain for w in windows]
    if settings.contender == "async":
        writes = [commits[k] - clocks.ends[step] for k, step in enumerate(saved)]
    else:
        writes = [clocks.gaps[step] for step in saved]
    folder = Path(settings.folder) / f"checkpoint-{saved[-1]}"
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    before = clocks.peaks[saved[0]]
    after = max(peak for step, peak in clocks.peaks.items() if step > saved[0])
    return {
        "stall_seconds": stalls,
        "cost_seconds": costs,
        "write_seconds": writes,
        "step_seconds": plain,
        "disk_bytes": sum(sizes),
        "plain_write_seconds": plain_write(Path(settings.folder), sum(sizes)),
        "memory_bytes": after - before,
        "num_parameters": sum(
            getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()
        ),
        "versions": _versions(),
    }


@contextlib.contextmanager
def noted_commits(times: list[float]) -> Iterator[None]:
    """Note when each checkpoint of dstrain is committed, on all ranks by the main one's clock."""
    from dstrain.checkpoint import save

    finish = save.CheckpointWriter._finish

    @functools.wraps(finish)
    def noting(self: Any, job: Any) -> Any:
        failures = finish(self, job)
        times.append(time.perf_counter())
        return failures

    save.CheckpointWriter._finish = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        save.CheckpointWriter._finish = finish  # type: ignore[method-assign]


def plain_write(folder: Path, num_bytes: int) -> float:
    """Measure the seconds in which all ranks together write and fsync so much, as ``dd`` would."""
    buffer = os.urandom(CHUNK_BYTES)
    left = num_bytes // dist.get_world_size()
    path = folder / f"plain-{dist.get_rank()}"
    dist.barrier()
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        while left > 0:
            left -= file.write(buffer[:left] if left < CHUNK_BYTES else buffer)
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


# --- loading -------------------------------------------------------------------------------------


def load_task(settings: Settings, clocks: Clocks, run: Callable[..., Any]) -> dict[str, Any]:
    """Resume from the last checkpoint and take one step."""
    step = settings.saves * settings.steps_between
    checkpoint = Path(settings.folder) / f"checkpoint-{step}"
    watch = LoadWatch()
    hooks = watched_transformers if settings.contender == "transformers" else watched_dstrain
    with hooks(watch):
        trainer = run(settings, clocks, resume=str(checkpoint))
    parameters = list(trainer.model.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    largest = max(getattr(p, "ds_numel", p.numel()) for p in parameters)
    state = [p for p in checkpoint.rglob("*") if p.suffix in (".pt", ".safetensors")]
    read = [p for p in state if "state" in p.parent.name or "global_step" in p.parent.name]
    return {
        "load_seconds": watch.seconds,
        "verify_seconds": watch.verify_seconds,
        "anonymous_bytes": watch.anonymous_bytes,
        "resident_bytes": watch.resident_bytes,
        "read_bytes": sum(p.stat().st_size for p in read),
        "plain_read_seconds": plain_read(read),
        "partition_bytes": 12 * total // settings.world_size,
        "created_bytes": 8 * total // settings.world_size,  # Adam's; master weights are there
        "largest_bytes": 4 * largest,
    }


class LoadWatch:
    """Time and memory of the part that loads."""

    def __init__(self) -> None:
        self.seconds = self.verify_seconds = 0.0
        self.anonymous_bytes = self.resident_bytes = 0

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Measure a load in the block: ranks begin and end together; a thread samples memory."""
        over = threading.Event()
        peak = before = status_bytes("RssAnon")

        def sample() -> None:
            nonlocal peak
            while not over.wait(SAMPLE_SECONDS):
                peak = max(peak, status_bytes("RssAnon"))

        forget_peak()
        resident = status_bytes("VmRSS")
        thread = threading.Thread(target=sample)
        dist.barrier()
        thread.start()
        started = time.perf_counter()
        yield
        dist.barrier()
        self.seconds = time.perf_counter() - started
        over.set()
        thread.join()
        self.anonymous_bytes = max(peak, status_bytes("RssAnon")) - before
        self.resident_bytes = status_bytes("VmHWM") - resident


@contextlib.contextmanager
def watched_dstrain(watch: LoadWatch) -> Iterator[None]:
    """Watch what puts a checkpoint into the engine, and the check of its files before that."""
    from dstrain.trainer import start

    load_into, choose_checkpoint = start.load_into, start.choose_checkpoint

    def loading(*args: Any, **kwargs: Any) -> Any:
        with watch.loading():
            return load_into(*args, **kwargs)

    def choosing(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        chosen = choose_checkpoint(*args, **kwargs)
        watch.verify_seconds = time.perf_counter() - started
        return chosen

    start.load_into, start.choose_checkpoint = loading, choosing
    try:
        yield
    finally:
        start.load_into, start.choose_checkpoint = load_into, choose_checkpoint


@contextlib.contextmanager
def watched_transformers(watch: LoadWatch) -> Iterator[None]:
    """Watch the same of transformers, which checks nothing."""
    from transformers import trainer

    load = trainer.deepspeed_load_checkpoint

    def loading(*args: Any, **kwargs: Any) -> Any:
        with watch.loading():
            return load(*args, **kwargs)

    trainer.deepspeed_load_checkpoint = loading
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = load


def plain_read(files: list[Path]) -> float:
    """Measure the seconds in which all ranks together read these files, each its share."""
    buffer = bytearray(CHUNK_BYTES)
    dist.barrier()
    started = time.perf_counter()
    for path in sorted(files):
        share = path.stat().st_size // dist.get_world_size()
        with open(path, "rb", buffering=0) as file:
            file.seek(share * dist.get_rank())
            while share > 0:
                share -= file.readinto(buffer) or share
    dist.barrier()
    return time.perf_counter() - started


# --- the contenders ------------------------------------------------------------------------------


def run_dstrain(settings: Settings, clocks: Clocks, resume: str | None = None) -> Any:
    """Return dstrain's Trainer."""
    from transformers import TrainerCallback

    from dstrain import Trainer

    trainer = Trainer(
        build_model(),
        _arguments(settings),
        train_dataset=_data(settings),
        callbacks=[_callback(TrainerCallback, clocks)],
    )
    trainer.train(resume or False)
    return trainer


def run_transformers(settings: Settings, clocks: Clocks, resume: str | None = None) -> Any:
    """Return transformers' Trainer, with accelerate, on the same DeepSpeed config."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = build_model()  # before the arguments, which may turn on zero.Init
    args = TrainingArguments(
        output_dir=settings.folder,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        deepspeed=_config(settings),
        **_common(settings),
    )
    trainer = Trainer(
        model, args, train_dataset=_data(settings), callbacks=[_callback(TrainerCallback, clocks)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _common(settings: Settings) -> dict[str, Any]:
    """Return arguments that both trainers know."""
    steps = settings.steps_between * (settings.saves + 1)
    last = settings.steps_between * settings.saves
    return {
        # A window more than saves, so that the last save's cost is seen too.
        "max_steps": steps if settings.task == "save" else last + 1,
        "save_steps": settings.steps_between,
        "save_strategy": "steps" if settings.task == "save" else "no",
        "save_total_limit": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1000,
        "disable_tqdm": True,
        "seed": SEED,
    }


def _arguments(settings: Settings) -> Any:
    from dstrain import TrainingArguments

    return TrainingArguments(
        output_dir=settings.folder,
        zero_stage=str(settings.stage),
        bf16=settings.precision == "bf16",
        report_to=["none"],
        save_async=settings.contender != "sync",
        **_common(settings),
    )


def _config(settings: Settings) -> dict[str, Any]:
    """Return the DeepSpeed config that dstrain resolves to, for transformers."""
    from dstrain.config import Facts, resolve
    from dstrain.engine import model_facts

    resolved = resolve(
        _arguments(settings),
        Facts(
            world_size=settings.world_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            num_training_steps=1000,
            model=model_facts(build_model()),
        ),
    )
    config = resolved.to_deepspeed()
    if settings.stage == 3:
        # Else transformers leaves the weights out of its checkpoint, which dstrain's has.
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def build_model() -> Any:
    """Return a llama of 32 million parameters, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2112,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _data(settings: Settings) -> Blocks:
    draw = torch.Generator().manual_seed(SEED)
    return Blocks(torch.randint(0, VOCAB_SIZE, (512, settings.block_size), generator=draw))


def _callback(base: type[Any], clocks: Clocks) -> Any:
    class Tell(base):
        """Tells the clocks of a trainer's events."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clocks.step_begins(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clocks.step_ends(state.global_step)

    return Tell()


def status_bytes(name: str) -> int:
    """Return a figure of this process's memory as Linux gives it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Let VmHWM begin anew at what is resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _versions() -> dict[str, str]:
    import deepspeed
    import transformers

    return {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)}


TASKS = {"save": save_task, "load": load_task}


if __name__ == "__main__":
    main()
