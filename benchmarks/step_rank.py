"""One rank of a run of `step.py`: a trainer whose every block of steps is followed by a block of
the hand-written loop, on an engine and a copy of the model of its own, in the same process group.
"""

from __future__ import annotations

import cProfile
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hand_written import STEPS, Blocks, build_engine, build_loader, build_model
from step import Settings

VOCAB_SIZE = 4096
SEED = 42
LEARNING_RATE = 1e-3


@dataclass
class Setup:
    """What both loops of a run share."""

    settings: Settings
    config: dict[str, Any]
    dataset: Blocks
    order: torch.Tensor  # the order in which dstrain's trainer takes the samples

    def hand_written(self) -> LoggedSteps:
        """Return the hand-written loop with an engine of its own, at its start."""
        settings = self.settings
        world_size, rank = dist.get_world_size(), dist.get_rank()
        engine = build_engine(model_of(settings), self.config, num_steps=settings.num_steps)
        # Each rank takes its share of every chunk of micro_batch x world_size samples.
        chunks = self.order.view(-1, world_size, settings.micro_batch)
        loader = build_loader(
            self.dataset,
            chunks[:, rank].reshape(-1).tolist(),
            micro_batch=settings.micro_batch,
            pin_memory=engine.device.type != "cpu",
        )
        steps = STEPS[settings.baseline](engine, loader, settings.accumulation)
        return LoggedSteps(steps, settings.logging_steps, is_share=settings.baseline == "weighted")


class LoggedSteps:
    """A hand-written loop that now and then logs its mean loss, one of the few waits in it."""

    def __init__(self, steps: Iterator[torch.Tensor], every: int, *, is_share: bool) -> None:
        """Begin at zero.

        Args:
            steps: the loop, which yields the loss of each step.
            every: steps between logs.
            is_share: whether losses are this rank's share of the mean.
        """
        self._steps = steps
        self._every = every
        self._is_share = is_share
        self._total: torch.Tensor | float = 0.0
        self._step = 0
        self._losses: list[float] = []

    def __iter__(self) -> LoggedSteps:
        """Return itself."""
        return self

    def __next__(self) -> None:
        """Take one optimizer step."""
        self._total = self._total + next(self._steps)
        self._step += 1
        if self._step % self._every == 0:
            self._losses.append(float(self._total) / self._every)
            self._total = 0.0
            print(f"step {self._step}  loss {self._losses[-1]:.4f}", flush=True)

    def losses_over_ranks(self) -> list[float]:
        """Return the logged losses of the global batch; a collective of all ranks."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._losses)
        parts = 1 if self._is_share else len(gathered)
        return [sum(losses) / parts for losses in zip(*gathered, strict=True)]


@dataclass(frozen=True)
class Instant:
    """Wall clock and this process's processor time, when no rank has work left to do."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Instant:
        """Wait for the other ranks and for the device, then look at the clocks."""
        if dist.get_world_size() > 1:
            dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Instant(time.perf_counter(), time.process_time())


@dataclass
class Alternation:
    """Called after each of a trainer's steps: runs the other loop's block when one is full.

    The clock of the trainer's block stands from the end of one block of the hand-written loop to
    the end of the trainer's last step, so all that a trainer does between two steps is counted.
    """

    settings: Settings
    build_hand: Callable[[], LoggedSteps]
    trainer_spans: list[tuple[float, float]] = field(default_factory=list)
    hand_spans: list[tuple[float, float]] = field(default_factory=list)

    def prepare(self) -> None:
        """Build the hand-written loop now, where it is to be built before the trainer's engine."""
        if not self.settings.hand_first:
            return
        import deepspeed

        deepspeed.init_distributed()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self._hand = self.build_hand()

    def begin(self) -> None:
        """Build the hand-written loop once the trainer has its engine, unless it is there."""
        if not self.settings.hand_first:
            self._hand = self.build_hand()
        self._profile = cProfile.Profile()
        self._since = Instant.now()

    def step_ended(self, step: int) -> None:
        """Change loops where a block ends."""
        if step % self.settings.steps_per_block:
            return
        self._profile.disable()
        middle = Instant.now()
        for _ in range(self.settings.steps_per_block):
            next(self._hand)
        end = Instant.now()
        self.trainer_spans.append(_span(self._since, middle))
        self.hand_spans.append(_span(middle, end))
        # One wait between any two blocks, so that both kinds begin alike.
        self._since = end
        if self.settings.profile and dist.get_rank() == 0:
            self._profile.enable()

    def finish(self, trainer_losses: list[float]) -> dict[str, Any]:
        """Collect the measured pairs of all ranks but the first one, and how losses compare."""
        if self.settings.profile and dist.get_rank() == 0:
            self._profile.disable()
            self._profile.dump_stats(self.settings.profile)
        gathered: list[Any] = [None] * dist.get_world_size()
        mine = (self.trainer_spans, self.hand_spans)
        dist.all_gather_object(gathered, mine)
        pairs = []
        for index in range(1, len(self.hand_spans)):
            trainer = [spans[index] for spans, _ in gathered]
            hand = [spans[index] for _, spans in gathered]
            pairs.append(
                {
                    "trainer_seconds": max(wall for wall, _ in trainer),
                    "hand_seconds": max(wall for wall, _ in hand),
                    "trainer_cpu_seconds": sum(cpu for _, cpu in trainer),
                    "hand_cpu_seconds": sum(cpu for _, cpu in hand),
                }
            )
        hand_losses = self._hand.losses_over_ranks()
        return {
            "pairs": pairs,
            "hand_losses": hand_losses,
            "trainer_losses": trainer_losses,
            "loss_difference": max(
                (abs(a - b) / b for a, b in zip(trainer_losses, hand_losses, strict=False)),
                default=float("inf"),
            ),
        }


def main() -> None:
    """Run one contender; rank 0 writes the result."""
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if settings.contender == "transformers" and not importlib.util.find_spec("accelerate"):
        if int(os.environ["RANK"]) == 0:
            result = {"missing": "accelerate is not installed"}
            Path(settings.result).write_text(json.dumps(result))
        return
    setup = _setup(settings)
    alternation = Alternation(settings, setup.hand_written)
    alternation.prepare()
    with tempfile.TemporaryDirectory() as folder:
        losses = RUNS[settings.contender](setup, alternation, folder)
    result = alternation.finish(losses) | _facts(settings)
    if dist.get_rank() == 0:
        Path(settings.result).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_dstrain(setup: Setup, alternation: Alternation, folder: str) -> list[float]:
    """Run dstrain's Trainer; return the losses it logged."""
    from transformers import TrainerCallback

    from dstrain import Trainer

    trainer = Trainer(
        model_of(setup.settings),
        _arguments(setup.settings, folder),
        train_dataset=setup.dataset,
        callbacks=[_callback(TrainerCallback, alternation)],
    )
    trainer.train()
    used, meant = trainer.resolved.to_deepspeed(), setup.config
    assert used == meant, f"the engines had different configs: {used} and {meant}"
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_transformers(setup: Setup, alternation: Alternation, folder: str) -> list[float]:
    """Return transformers' Trainer, with accelerate, on the same DeepSpeed config."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InGivenOrder(Trainer):
        """accelerate deals whole micro-batches to the ranks, so this is the others' order."""

        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(setup.dataset)

    model = model_of(setup.settings)  # before the arguments, which may turn on zero.Init
    settings = setup.settings
    args = TrainingArguments(
        output_dir=folder,
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=LEARNING_RATE,
        logging_steps=settings.logging_steps,
        save_strategy="no",
        report_to=[],
        bf16=_format(settings) == "bf16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=setup.config,
    )
    trainer = InGivenOrder(
        model,
        args,
        train_dataset=Blocks(setup.dataset.tokens[setup.order]),
        callbacks=[_callback(TrainerCallback, alternation)],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_control(setup: Setup, alternation: Alternation, folder: str) -> list[float]:
    """Run the hand-written loop against a second one, to see what a ratio of 1 looks like here."""
    import deepspeed

    deepspeed.init_distributed()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    steps = setup.hand_written()
    alternation.begin()
    for step, _ in enumerate(steps, start=1):
        alternation.step_ended(step)
    return steps.losses_over_ranks()


RUNS: dict[str, Callable[[Setup, Alternation, str], list[float]]] = {
    "dstrain": run_dstrain,
    "transformers": run_transformers,
    "control": run_control,
}


def model_of(settings: Settings) -> Any:
    """Make a model with fresh weights, the same for both loops."""
    return build_model(
        settings.model, vocab_size=VOCAB_SIZE, block_size=settings.block_size, seed=SEED
    )


def _setup(settings: Settings) -> Setup:
    """Return the samples of the whole run in one epoch, and the one config of both engines."""
    from dstrain.config import Facts, resolve
    from dstrain.data import EpochOrder
    from dstrain.engine import model_facts

    num_samples = (
        settings.num_steps * settings.accumulation * settings.micro_batch * settings.world_size
    )
    draw = torch.Generator().manual_seed(SEED)
    shape = (num_samples, settings.block_size)
    resolved = resolve(
        _arguments(settings, "unused"),
        Facts(
            world_size=settings.world_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            num_training_steps=settings.num_steps,
            model=model_facts(model_of(settings)),
        ),
    )
    return Setup(
        settings,
        resolved.to_deepspeed(),
        Blocks(torch.randint(0, VOCAB_SIZE, shape, generator=draw)),
        EpochOrder(num_samples, seed=SEED, shuffle=True).indices(0),
    )


def _arguments(settings: Settings, folder: str) -> Any:
    """Return dstrain's arguments, as a user who logs rarely would give them."""
    from dstrain import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=LEARNING_RATE,
        logging_steps=settings.logging_steps,
        save_strategy="no",
        report_to=["none"],
        zero_stage=str(settings.stage),
        bf16=_format(settings) == "bf16",
        seed=SEED,
    )


def _format(settings: Settings) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if torch.cuda.is_available() else "fp32"


def _callback(base: type[Any], alternation: Alternation) -> Any:
    class Alternate(base):
        """Tells the alternation of a trainer's events."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            alternation.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            alternation.step_ended(state.global_step)

    return Alternate()


def _span(start: Instant, end: Instant) -> tuple[float, float]:
    return end.wall - start.wall, end.cpu - start.cpu


def _facts(settings: Settings) -> dict[str, Any]:
    import deepspeed
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device_type": "cuda" if cuda else "cpu",
        "device_name": torch.cuda.get_device_name() if cuda else "CPU",
        "format": _format(settings),
        "threads": torch.get_num_threads(),
        "num_parameters": sum(p.numel() for p in model_of(settings).parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)},
    }


if __name__ == "__main__":
    main()
