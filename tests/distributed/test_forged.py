"""Forged and damaged checkpoints on real ranks: a run falls back, or all ranks have one error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tests.distributed.runs import make_trainer
from tests.unit.checkpoint.forged import (
    NAME,
    OWN,
    RUN,
    SLICES,
    STATE,
    forge,
    forge_header,
    mutated,
    relist,
    with_pickle,
)

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "train": 16, "max_steps": 4}


RESUMES = 60


class Counting(TrainerCallback, ExportableState):
    """A callback with a state."""

    def __init__(self, start: int = 0) -> None:
        self.seen = start

    def state(self) -> dict[str, Any]:
        return {"args": {"start": 0}, "attributes": {"seen": self.seen}}


def train(folder: Path, resume: Any = None, **settings: Any) -> tuple[int, str]:
    """Train; the last step, and what was wrong."""
    from dstrain.core.errors import DstrainError

    trainer = make_trainer(folder, callbacks=[Counting()], **{**SETTINGS, **settings})
    try:
        trainer.train(resume)
    except DstrainError as error:  # a loss that was forged to NaN is a TrainingError
        assert len(error.problems) == 1  # noqa: PT017
        return trainer.state.global_step, str(error)
    finally:
        trainer.close()
    return trainer.state.global_step, ""


def on_main(rank: int, act: Callable[[], object]) -> None:
    from dstrain.core.ranks import barrier

    if rank == 0:
        act()
    barrier()


@pytest.mark.ranks(2, timeout=300)
def test_no_pickle_is_executed_whatever_the_manifest_says(tmp_path: Path, rank: int) -> None:
    """``"layout": "x"`` once fell through to DeepSpeed's loader, on a plain resume."""
    from dstrain.core.ranks import gather_objects

    run, marker = tmp_path / "run", tmp_path / "marker"
    train(run)
    kept = tmp_path / "kept"
    on_main(rank, lambda: shutil.copytree(run / "checkpoint-4", kept))
    for layout, says in (
        ("x", "layout"),
        ("deepspeed", "executes the pickles"),
    ):
        on_main(rank, lambda layout=layout: with_pickle(run / "checkpoint-4", marker, layout))
        # A run of another format of checkpoints, with the same ranks, stage and precision.
        _, error = train(run, str(run / "checkpoint-4"), max_steps=6)
        assert says in error
        assert len(set(gather_objects(error))) == 1
        assert not marker.exists()
        on_main(rank, lambda: shutil.rmtree(run / "checkpoint-4"))
        on_main(rank, lambda: shutil.copytree(kept, run / "checkpoint-4"))
    on_main(rank, lambda: with_pickle(run / "checkpoint-4", marker, "x"))
    assert train(run, True, max_steps=6) == (6, "")
    assert not marker.exists()


def brackets(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 200_000 + "]" * 200_000)
    if name != NAME:
        relist(folder, name)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("name", [NAME, RUN, OWN, STATE])
def test_deep_nesting_falls_back_on_all_ranks(tmp_path: Path, rank: int, name: str) -> None:
    """``rank-00000.json`` is read by one rank alone."""
    run = tmp_path / "run"
    train(run)
    on_main(rank, lambda: brackets(run / "checkpoint-4", name))
    on_main(rank, lambda: (run / "checkpoint-9").mkdir())
    assert train(run, True) == (4, "")
    folder = run / "checkpoint-4"
    on_main(rank, lambda: brackets(folder, name))
    _, error = train(run, str(folder))
    assert "nested deeper" in error


def of_schedule(run: Any) -> Any:
    run["engine"]["schedule"] = {**run["engine"]["schedule"], "last_epoch": "soon"}
    return run


def of_method_of_schedule(run: Any) -> Any:
    run["engine"]["schedule"] = {**run["engine"]["schedule"], "step": 3}
    return run


def of_count(run: Any) -> Any:
    run["engine"]["schedule"] = {**run["engine"]["schedule"], "_step_count": []}
    return run


def of_groups(run: Any) -> Any:
    run["engine"]["groups"] = [{**g, "betas": 3} for g in run["engine"]["groups"]]
    return run


def of_steps(run: Any) -> Any:
    run["engine"]["schedule"] = {**run["engine"]["schedule"], "last_epoch": 10**15}
    return run


def of_callback(state: Any) -> Any:
    state["stateful_callbacks"]["Counting"] = {"args": {"begin": 3}}
    return state


def of_method(state: Any) -> Any:
    state["stateful_callbacks"]["Counting"] = {"attributes": {"on_step_end": 3}}
    return state


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (RUN, of_schedule, "the learning-rate schedule"),
        (RUN, of_steps, "the learning-rate schedule"),
        (RUN, of_method_of_schedule, "step is no part of the state"),
        (RUN, of_count, r"_step_count is []"),
        (RUN, of_groups, "betas=3"),
        (STATE, of_callback, "the callback Counting"),
        (STATE, of_method, "on_step_end is no attribute"),
    ],
)
def test_a_state_that_an_object_cannot_take_up_is_named(
    tmp_path: Path, rank: int, name: str, change: Any, says: str
) -> None:
    """What users' objects own has no type at the door."""
    from dstrain.core.ranks import gather_objects

    run = tmp_path / "run"
    train(run)
    on_main(rank, lambda: forge(run / "checkpoint-4", name, change))
    restores = {"restore_callback_states_from_checkpoint": True}
    _, error = train(run, True, max_steps=6, **restores)
    assert says in error
    assert len(set(gather_objects(error))) == 1


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failure", ["stop", "continue"])
def test_a_folder_of_the_users_own_is_never_removed(
    tmp_path: Path, rank: int, failure: str, asynchronous: bool
) -> None:
    """Its name is that of a checkpoint to come; the run goes on as ``save_failure`` says."""
    from dstrain.core.ranks import gather_objects

    mine = tmp_path / "run/checkpoint-2/notes.txt"
    on_main(rank, lambda: (mine.parent.mkdir(parents=True), mine.write_text("mine")))
    settings = {"save_failure": failure, "save_async": asynchronous}
    step, error = train(tmp_path / "run", **settings)
    assert mine.read_text() == "mine"
    assert [p.name for p in mine.parent.iterdir()] == ["notes.txt"]
    (kept,) = mine.parent.parent.glob("checkpoint-2.kept-*")
    assert json.loads((kept / NAME).read_text())["step"] == 2
    if failure == "continue":
        assert (step, error) == (4, "")
    else:
        assert str(kept) in error
    assert len(set(gather_objects(error))) == 1
    assert train(tmp_path / "run", str(kept), save_steps=3, max_steps=6) == (6, "")
    assert kept.is_dir()
    assert mine.read_text() == "mine"


def spoilt(run: Path, kept: Path, seed: int) -> None:
    """Forge one document of the newest checkpoint, with right checksums."""
    folder = run / "checkpoint-4"
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.copytree(kept, folder)
    draw = random.Random(seed)
    name = draw.choice([RUN, RUN, RUN, OWN, STATE, SLICES])
    if name == SLICES:
        forge_header(folder, name, draw)
    else:
        forge(folder, name, lambda document: mutated(document, draw))


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=580)
def test_a_run_that_takes_up_what_was_forged_trains_or_ends_with_one_error(
    tmp_path: Path, rank: int
) -> None:
    """Behind the door: schedules, groups, meters, random states and callbacks of a real run."""
    from dstrain.core.ranks import gather_objects

    run, kept = tmp_path / "run", tmp_path / "kept"
    train(run)
    on_main(rank, lambda: shutil.copytree(run / "checkpoint-4", kept))
    trained = 0
    for seed in range(RESUMES):
        on_main(rank, lambda seed=seed: spoilt(run, kept, seed))
        restores = {"restore_callback_states_from_checkpoint": True}
        try:
            outcome = train(run, True, max_steps=5, save_strategy="no", **restores)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert outcome[1] or outcome[0] >= 5, (seed, outcome)
        trained += not outcome[1]
        assert len(set(gather_objects(outcome))) == 1, seed
    assert 0 < trained < RESUMES
