"""Models with state beside their weights, and runs of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models import SEED


class Base(nn.Module):
    """A classifier whose outputs are scaled by what a subclass says."""

    def __init__(self) -> None:
        """Initialise weights from the seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.passes = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        """Map x [batch, 4] and labels [batch] to the loss and logits [batch, 3]."""
        if self.training:
            self.passes += 1
            self.gather(x.detach())
        logits = self.head(torch.tanh(self.inner(x))) * self.scale()
        return nn.functional.cross_entropy(logits, labels), logits

    def gather(self, x: torch.Tensor) -> None:
        """Take notice of a batch in training."""

    def scale(self) -> Any:
        """Return what outputs are multiplied by."""
        return 1.0

    def told(self) -> Any:
        """Return the state, to be compared."""
        return None


class Hears(Base):
    """Keeps a sum of its own rows as extra state, and numbers under keys that are no strings."""

    def __init__(self) -> None:
        """Begin with nothing heard."""
        super().__init__()
        self.heard = 0.0

    def gather(self, x: torch.Tensor) -> None:
        """Add up."""
        self.heard += float(x.sum())

    def scale(self) -> Any:
        """Return a number that grows with what was heard."""
        return 1.0 + 0.01 * abs(self.heard)

    def told(self) -> Any:
        """Return the sum."""
        return self.heard

    def get_extra_state(self) -> Any:
        """Return the sum."""
        return {0: self.heard}

    def set_extra_state(self, state: Any) -> None:
        """Take up the sum."""
        self.heard = state[0]


class Tells(Base):
    """Keeps the number of its passes as extra state, a tensor."""

    def scale(self) -> Any:
        """Return a number that grows with the passes."""
        return 1.0 + 0.1 * self.passes

    def told(self) -> Any:
        """Return the number."""
        return self.passes

    def get_extra_state(self) -> Any:
        """Return the number."""
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Any) -> None:
        """Take up the number."""
        self.passes = int(state)


class Counts(Base):
    """Counts its passes in a buffer."""

    def __init__(self) -> None:
        """Begin with no passes."""
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def gather(self, x: torch.Tensor) -> None:
        """Count."""
        self.count += 1


class Sheds(Counts):
    """Has a buffer for its first three passes only."""

    def __init__(self) -> None:
        """Make the buffer."""
        super().__init__()
        self.register_buffer("crutch", torch.tensor(0.5))

    def gather(self, x: torch.Tensor) -> None:
        """Change the buffer, or throw it away."""
        super().gather(x)
        if self.crutch is not None:
            self.crutch = None if int(self.count) >= 3 else self.crutch + 0.125

    def scale(self) -> Any:
        """Return another number when the buffer is gone."""
        return 2.0 if self.crutch is None else self.crutch

    def told(self) -> Any:
        """Return the buffer."""
        return None if self.crutch is None else float(self.crutch)


class Outgrows(Counts):
    """Has a buffer that takes another shape and format at the third pass."""

    def __init__(self) -> None:
        """Make the buffer."""
        super().__init__()
        self.register_buffer("table", torch.ones(1, dtype=torch.int64))

    def gather(self, x: torch.Tensor) -> None:
        """Change the buffer, once by another."""
        super().gather(x)
        if int(self.count) == 3:
            self.table = torch.full((2, 2), 1.5)
        else:
            self.table += 1

    def scale(self) -> Any:
        """Return the mean of the buffer."""
        return self.table.float().mean()

    def told(self) -> Any:
        """Return the buffer."""
        return self.table.tolist()


class Renames(Counts):
    """Has its buffer under another name in the state_dict."""

    def __init__(self) -> None:
        """Register hooks that rename the buffer."""
        super().__init__()

        def save(module: Any, state: Any, prefix: str, metadata: Any) -> None:
            state[prefix + "passes"] = state.pop(prefix + "count")

        def load(module: Any, state: Any, prefix: str, *_: Any) -> None:
            state[prefix + "count"] = state.pop(prefix + "passes")

        self._register_state_dict_hook(save)
        self.register_load_state_dict_pre_hook(load)

    def scale(self) -> Any:
        """Return a number that grows with the passes."""
        return 1.0 + 0.1 * self.count

    def told(self) -> Any:
        """Return the number."""
        return int(self.count)


KINDS = {kind.__name__: kind for kind in (Hears, Sheds, Outgrows)}


class Keeper(nn.Linear):
    """A layer that adds up its weights whenever it is loaded."""

    def __init__(self, way: str) -> None:
        """Initialise the layer.

        Args:
            way: how it learns of being loaded.
        """
        super().__init__(8, 8)
        self.way, self.sum = way, 0.0
        if way == "after":
            self.register_load_state_dict_post_hook(lambda module, keys: module.add_up())
        if way == "before":
            self.register_load_state_dict_pre_hook(
                lambda module, state, prefix, *_: module.add_up(state[prefix + "weight"])
            )

    def add_up(self, weight: torch.Tensor | None = None) -> None:
        """Note the sum of the weights."""
        self.sum = float((self.weight if weight is None else weight).detach().double().sum())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.way == "itself":
            self.add_up()


class LoadsParts(Base):
    """A classifier with layers that compute something of their weights on loading."""

    ways = ("after", "before", "itself")

    def __init__(self) -> None:
        """Initialise weights from the seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            keepers = [Keeper(way) for way in self.ways]
        self.inner = nn.Sequential(self.inner, *keepers)

    @property
    def sums(self) -> list[float]:
        """Return the sums that were computed."""
        return [layer.sum for layer in self.inner if isinstance(layer, Keeper)]


class LoadsWhole(LoadsParts):
    """A classifier that computes something of its weights on loading."""

    ways = ("whole",)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load and add up."""
        result = super().load_state_dict(*args, **kwargs)
        self.inner[1].add_up()
        return result


class Wipes(Base):
    """Changes weights on loading, and puts another parameter in the place of one."""

    def __init__(self) -> None:
        """Register the hook."""
        super().__init__()

        def wipe(module: Any, keys: Any) -> None:
            module.weight.data.zero_()
            module.bias = nn.Parameter(torch.ones_like(module.bias))

        self.head.register_load_state_dict_post_hook(wipe)


class NotItsOwn(Base):
    """Has loading hooks of its own in partials, and one that a library has put there."""

    def __init__(self) -> None:
        """Register hooks."""
        super().__init__()
        self.called: list[str] = []

        def note(word: str, *args: Any) -> None:
            self.called.append(word)

        def of_library(module: Any, *args: Any) -> None:
            self.called.append("library")

        of_library.__module__ = "deepspeed.linear.optimized_linear"
        self.head.register_load_state_dict_pre_hook(partial(note, "partial before"))
        self.head.register_load_state_dict_post_hook(partial(note, "partial after"))
        self.inner.register_load_state_dict_pre_hook(of_library)
        self.inner.register_load_state_dict_post_hook(of_library)


class Doubles(Base):
    """Has a weight twice as large in the state_dict."""

    def __init__(self) -> None:
        """Register hooks."""
        super().__init__()

        def save(module: Any, state: Any, prefix: str, metadata: Any) -> None:
            state[prefix + "weight"] = state[prefix + "weight"] * 2

        def load(module: Any, state: Any, prefix: str, *_: Any) -> None:
            state[prefix + "weight"] = state[prefix + "weight"] / 2

        self.head._register_state_dict_hook(save)
        self.head.register_load_state_dict_pre_hook(load)


def rows() -> list[dict[str, torch.Tensor]]:
    """Return rows of several lengths of an epoch."""
    draw = torch.Generator().manual_seed(SEED)
    return [{"x": torch.randn(4, generator=draw), "labels": torch.tensor(k % 3)} for k in range(24)]


def trainer_of(folder: Any, model: nn.Module, stage: int, **settings: Any) -> Any:
    """Make a trainer of the model, which notes its state at every save, and sums at the start."""
    from transformers import TrainerCallback

    from dstrain import Trainer, TrainingArguments

    seen: dict[Any, Any] = {}

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            seen[state.global_step] = kw["model"].told()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            seen["began"] = getattr(kw["model"], "sums", kw["model"].told())

    with_step = settings.pop("compute_metrics", False)
    arguments = {
        "zero_stage": str(stage), "per_device_train_batch_size": 2, "max_steps": 6,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": "none",
        "logging_steps": 1, "disable_tqdm": True, **settings,
    }  # fmt: skip
    trainer: Any = Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows(),
        eval_dataset=rows()[:4],
        compute_metrics=None,
        callbacks=[Look()],
    )
    if with_step:
        trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    trainer.seen = seen
    return trainer


@dataclass(frozen=True)
class Run:
    """What a run came to: its losses, and this rank's state at its end."""

    losses: list[float]
    state: Any


def run_of(
    folder: Path, model: nn.Module, stage: int, *, resume: str | None = None, **settings: Any
) -> Run:
    """Train, perhaps from a checkpoint."""
    trainer = trainer_of(folder, model, stage, **settings)
    trainer.train(resume_from_checkpoint=resume)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = trainer.model.told()
    trainer.close()
    return Run(found, told)
