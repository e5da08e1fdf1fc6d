"""What ``tests.distributed.forked`` runs: many short runs in forks of one process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from tests.distributed.forked import Ranks

# --- killed at random moments --------------------------------------------------------------------

KILLS = 50
STEPS = 60
SEED = 11
_LEFT = (".writing-", ".removing-", ".replaced-")
_BEGINS = (".writing-", ".writing-", ".writing-", ".removing-")


def train(folder: Path, resume: Any = False, **settings: Any) -> None:
    """Train in ``folder``; the main rank writes ``outcome.json``."""
    from tests.distributed.runs import history, losses, make_trainer, weights_digest
    from tests.models import tiny_llama

    build = settings.pop("build", tiny_llama)
    model = build(**settings.pop("model", {}))
    trainer = make_trainer(folder, model=model, evaluation=0, **settings)
    trainer.train(resume)
    digest = weights_digest(trainer)
    if trainer.ranks.is_main:
        outcome = {
            "losses": losses(trainer),
            "history": history(trainer)[:-1],
            "weights": digest,
        }
        (folder / "outcome.json").write_text(json.dumps(outcome))


def outcome_of(folder: Path) -> Any:
    """Read the outcome of the run in a folder."""
    return json.loads((folder / "outcome.json").read_text())


def kills(folder: Path) -> dict[str, Any]:
    """Kill runs that save and rotate at every step, resume each, and look after every kill."""
    draw = random.Random(SEED)
    settings: dict[str, Any] = {
        "model": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        "train": 2 * STEPS, "max_steps": STEPS, "per_device_train_batch_size": 1, "bf16": True,
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_async": True,
    }  # fmt: skip
    found: dict[str, Any] = {"left": dict.fromkeys(_LEFT, 0), "same": [], "problems": []}
    done = 0
    for stage in (2, 3):
        whole, killed, log = (folder / f"{name}-{stage}" for name in ("whole", "killed", "log"))
        started = time.monotonic()
        Ranks(2, lambda: train(whole, stage=stage, **settings), log).wait(120)  # noqa: B023
        cycle = (time.monotonic() - started) / STEPS
        newest = 0
        until = KILLS // 2 if stage == 2 else KILLS
        while done < until:
            ranks = Ranks(2, lambda: train(killed, "auto", stage=stage, **settings), log)  # noqa: B023
            newest = _kill_while_saving(ranks, killed, draw, cycle, newest)
            if not ranks.failed and not ranks.living and (killed / "outcome.json").exists():
                break  # the run is over
            done += 1
            names = os.listdir(killed)
            for kind in _LEFT:
                found["left"][kind] += any(kind in name for name in names)
            found["problems"] += _look_at(killed, newest)
        Ranks(2, lambda: train(killed, "auto", stage=stage, **settings), log).wait(120)  # noqa: B023
        found["same"].append(outcome_of(killed) == outcome_of(whole))
    return {**found, "kills": done}


def _kill_while_saving(
    ranks: Ranks, folder: Path, draw: random.Random, cycle: float, newest: int
) -> int:
    """Kill one rank or all, some time after a save or a removal has begun; the newest seen."""
    kind = draw.choice(_BEGINS)
    wanted = draw.randint(1, 2)
    delay = draw.uniform(0.0, cycle if kind == ".writing-" else 0.002)
    alone = sorted(ranks.living)[draw.randint(0, 1)] if draw.random() < 0.4 else None
    seen: set[str] = set()
    deadline = time.monotonic() + 60
    before = None
    while ranks.poll():
        assert time.monotonic() < deadline, ranks.log.read_text()[-4000:]
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(folder)
        newest = max(newest, *(int(n[11:]) for n in names if n.startswith("checkpoint-")), 0)
        begun = {name for name in names if kind in name}
        if before is None:
            before = begun  # those of the run that was killed before
        seen |= begun - before
        if len(seen) >= wanted:
            time.sleep(delay)
            break
        time.sleep(0.0002)
    if alone is not None and ranks.poll():
        ranks.kill([alone])
        time.sleep(0.1)  # what does the other one do now?
    ranks.kill()
    return newest


def _look_at(folder: Path, newest: int) -> list[str]:
    """Say what is wrong after a kill."""
    from dstrain.checkpoint import committed, verify

    there = committed(folder)
    if not there:
        return [f"step {newest} is lost"] if newest else []
    problems = [f"{there[-1].folder.name}: {p}" for p in verify(there[-1].folder)[1]]
    if there[-1].step < newest:
        problems.append(f"step {newest} is lost, {there[-1].step} is the newest")
    return problems


# --- from one topology to another ----------------------------------------------------------------


def topologies(folder: Path) -> dict[str, Any]:
    """Return the outcome of every run of the table in ``test_topologies``, by the run's folder."""
    from tests.distributed.test_topologies import SAVED_AT, STEPS, TABLE, Place, resumed_name

    found: dict[str, Any] = {}

    def run(place: Place, name: str, resume: Any) -> None:
        settings = {
            "train": 6 * STEPS, "save_strategy": "steps", "save_steps": SAVED_AT, **place.settings
        }  # fmt: skip
        at = folder / name
        Ranks(place.ranks, lambda: train(at, resume, **settings), folder / f"log-{name}").wait(60)
        outcome = outcome_of(at)
        rates = [e["learning_rate"] for e in outcome["history"] if "loss" in e]
        found[name] = {"losses": outcome["losses"], "rates": rates}

    for number, (saved, places) in enumerate(TABLE.items()):
        run(saved, str(number), False)
        start = str(folder / str(number) / f"checkpoint-{SAVED_AT}")
        for place in places:
            run(place, resumed_name(saved, place), start)
    return found


def scalars(folder: Path) -> dict[str, Any]:
    """Return the outcomes of ``test_scalars_elsewhere``, whose model has parameters of shape ()."""
    from tests.distributed.test_scalars_elsewhere import OPTIMIZERS, SAVED_AT, STEPS, TABLE, name_of
    from tests.scaled import scaled_llama

    found: dict[str, Any] = {}
    for saved, places in TABLE.items():
        start: Any = False
        for place in (saved, *places):
            settings = {
                "train": 6 * STEPS, "save_strategy": "steps", "save_steps": SAVED_AT,
                "learning_rate": 1e-2, "optim": OPTIMIZERS[saved], **place.settings,
            }  # fmt: skip
            name = name_of(saved, place)
            Ranks(
                place.ranks,
                lambda: train(folder / name, start, build=scaled_llama, **settings),  # noqa: B023
                folder / f"log-{name}",
            ).wait(90)
            found[name] = outcome_of(folder / name)["losses"]
            start = start or str(folder / name / f"checkpoint-{SAVED_AT}")
    return found


# --- buffers -------------------------------------------------------------------------------------


def buffers(folder: Path) -> dict[str, Any]:
    """Return the main rank's buffers in a checkpoint of two ranks, and those of a resumed run."""
    from transformers import TrainerCallback

    from tests.distributed.buffers import TOPOLOGIES, buffers_of
    from tests.statistics import Statistics, trainer_of

    class Look(TrainerCallback):
        def __init__(self, at: Path, event: str) -> None:
            def look(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                values = {n: b.tolist() for n, b in buffers_of(kwargs["model"]).items()}
                (at / f"buffers-{os.environ['RANK']}.json").write_text(json.dumps(values))

            setattr(self, event, look)

    def run(at: Path, event: str, resume: Any, **settings: Any) -> None:
        at.mkdir(parents=True, exist_ok=True)
        trainer = trainer_of(at, Statistics(), 2, callbacks=[Look(at, event)], **settings)
        trainer.train(resume)

    found = {}
    for name, ranks in TOPOLOGIES.items():
        settings = {"ddp_broadcast_buffers": name != "apart", "max_steps": 4}
        first, second = folder / f"{name}-first", folder / f"{name}-second"
        saves = {"save_strategy": "steps", "save_steps": 4}
        Ranks(
            2,
            lambda: run(first, "on_train_end", False, **saves, **settings),  # noqa: B023
            folder / "log",
        ).wait(60)
        settings["max_steps"] = 5
        start = str(first / "checkpoint-4")
        Ranks(
            ranks,
            lambda: run(second, "on_train_begin", start, **settings),  # noqa: B023
            folder / "log",
        ).wait(60)
        names = [second / f"buffers-{rank}.json" for rank in range(ranks)]
        found[name] = [
            json.loads((first / "buffers-0.json").read_text()),
            [json.loads(path.read_text()) for path in names],
        ]
    return found


def module_state(folder: Path) -> dict[str, Any]:
    """Return state of modules on two ranks, and what a run on one rank begins with."""
    from tests.module_state import KINDS, trainer_of

    def note(at: Path, event: str, told: Any) -> None:
        (at / f"{event}-{os.environ['RANK']}.json").write_text(json.dumps(told))

    def run(at: Path, name: str, resume: Any) -> None:
        trainer = trainer_of(at, KINDS[name](), 2, save_steps=4, max_steps=5 if resume else 4)
        trainer.train(resume)
        if resume:
            note(at, "began", trainer.seen["began"])
        else:
            note(at, "saved", trainer.model.told())

    found = {}
    for name in KINDS:
        at = folder / name
        at.mkdir()
        Ranks(2, lambda: run(at, name, False), folder / "log").wait(60)  # noqa: B023
        start = str(at / "checkpoint-4")
        Ranks(1, lambda: run(at, name, start), folder / "log").wait(60)  # noqa: B023
        saved = [json.loads((at / f"saved-{rank}.json").read_text()) for rank in (0, 1)]
        found[name] = [saved, json.loads((at / "began-0.json").read_text())]
    return found


# --- streams -------------------------------------------------------------------------------------


def streams(folder: Path) -> dict[str, Any]:
    """Return the outcomes of the runs of ``test_streams``, and how many rows they read."""
    from tests.distributed.test_streams import PLACES, READ, SAVED_AT, STEPS, mixture

    found: dict[str, Any] = {}
    start: Any = False
    for name, (ranks, micro_batch, accumulation, workers) in PLACES.items():
        settings = {
            "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_AT,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers,
        }  # fmt: skip
        at = folder / name
        READ.value = 0
        Ranks(
            ranks,
            lambda: train(at, start, data=mixture(), **settings),  # noqa: B023
            folder / f"log-{name}",
        ).wait(60)
        found[name] = {**outcome_of(at), "read": READ.value}
        start = str(folder / "whole" / f"checkpoint-{SAVED_AT}")
    return found


# --- data that was split by rank -----------------------------------------------------------------


def split(folder: Path) -> dict[str, Any]:
    """Return what is said where the parts of two ranks were saved and three ranks go on."""
    from dstrain.core.errors import DataError
    from tests.distributed.split_data import EVEN, Part, trainer_of

    found: dict[str, Any] = {}

    def run(name: str, resume: Any, **settings: Any) -> None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        trainer = trainer_of(folder / name, Part(rank, world_size, EVEN), **settings)
        said = ""
        try:
            trainer.train(resume)
        except DataError as error:
            said = str(error)
        if not rank:
            (folder / f"{name}.txt").write_text(said)

    saving = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    Ranks(2, lambda: run("two", False, **saving), folder / "log").wait(60)
    for name, step in (("inside", 6), ("between", 12)):
        start = str(folder / "two" / f"checkpoint-{step}")
        Ranks(3, lambda: run(name, start, max_steps=16), folder / "log").wait(60)  # noqa: B023
        found[name] = (folder / f"{name}.txt").read_text()
    return found


# --- ranks that part at stage 3 -------------------------------------------------------------------


def part(folder: Path) -> dict[str, Any]:
    """Train steps that are alike, and one in which rank 1 runs another block; what ranks say."""

    def rank() -> None:
        from dstrain.core.errors import ModelError
        from tests.distributed.routed import RoutedByRank, trainer_of

        routes = ((4, 4), (4, 4), (4, 4), (4, 2))
        trainer = trainer_of(folder / "run", RoutedByRank(*routes), zero_stage="3", ddp_timeout=4)
        try:
            trainer.train()
        except ModelError as error:
            said = f"{trainer.state.global_step} steps, then: {error}"
            (folder / f"rank-{os.environ['RANK']}").write_text(said)
            time.sleep(1)  # the main rank holds the store

    Ranks(2, rank, folder / "log").wait(60)
    return {"said": [(folder / f"rank-{rank}").read_text() for rank in range(2)]}
