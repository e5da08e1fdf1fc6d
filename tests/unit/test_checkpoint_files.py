"""Manifest, folders, rotation and files of checkpoints, without a model."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dstrain.checkpoint import folders
from dstrain.checkpoint.codec import decode, encode
from dstrain.checkpoint.content import RUN
from dstrain.checkpoint.find import check_resumable, choose_checkpoint, verify
from dstrain.checkpoint.manifest import (
    NAME,
    Manifest,
    check_files,
    extra_files,
    read_manifest,
    write_manifest,
)
from dstrain.checkpoint.run_lock import RUN_LOCK, RunLock
from dstrain.core.errors import CheckpointError
from dstrain.core.files import record_of, write_bytes, write_json
from dstrain.core.ranks import Ranks
from dstrain.core.seeds import random_state, set_random_state
from dstrain.models.tensor_file import Stored, TensorReader, write_tensor_file


def run_values(step: int = 0, **engine: Any) -> dict[str, Any]:
    """Return the least that a ``run.json`` says."""
    counters = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
    return {
        "engine": {
            "counters": dict.fromkeys(counters, step),
            "loss_scale": None,
            "groups": [{"lr": 0.1}],
            "schedule": None,
            **engine,
        },
        "position": {},
        "global_batch_size": 4,
    }


def make_checkpoint(output_dir: Path, step: int, *, size: int = 5000) -> Path:
    """Make a committed checkpoint of a model with one parameter, written by two ranks."""
    staging = folders.new_staging(output_dir, step)
    values = torch.arange(size, dtype=torch.float32)
    cut = size // 3
    files = {}
    for rank, (start, stop) in enumerate([(0, cut), (cut, size)]):
        name = f"state/rank-{rank:05d}.safetensors"
        tensors = [
            Stored.of("master/w", values[start:stop]),
            Stored.of("exp_avg/w", -values[start:stop]),
        ]
        metadata = {
            "spans": json.dumps({"w": [start, stop - start]}),
            "scalars": json.dumps({"w": {"step": step}}),
        }
        files[name] = write_tensor_file(staging / name, tensors, metadata)
    files[RUN] = write_json(staging / RUN, run_values(step))
    files["trainer_state.json"] = write_json(staging / "trainer_state.json", {"step": step})
    manifest = Manifest(
        step=step,
        world_size=2,
        stage=2,
        precision="bf16",
        resumable=True,
        has_weights=False,
        created="2026-01-01T00:00:00+00:00",
        parameters={"w": (size // 10, 10)},
        optimized=("w",),
        metrics={"eval_loss": 1.5},
        files=files,
    )
    write_manifest(staging, manifest)
    return folders.commit(staging, output_dir, step)


# --- manifest and verification -------------------------------------------------------------------


def test_a_written_manifest_reads_back(tmp_path):
    """Every field, with the types that the rest of the room relies on."""
    folder = make_checkpoint(tmp_path, 7)
    manifest = read_manifest(folder)
    assert manifest.step == 7
    assert manifest.parameters == {"w": (500, 10)}
    assert manifest.metrics == {"eval_loss": 1.5}
    assert manifest.files["trainer_state.json"] == record_of(folder / "trainer_state.json")
    assert manifest.total_bytes == sum(
        p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != NAME
    )
    assert verify(folder) == (manifest, [])
    assert extra_files(folder, manifest) == []


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # the last byte of a JSON file is but a line break


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncate, "bytes instead of"),
        (damage_flip, "does not have its checksum"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("name", ["state/rank-00001.safetensors", "trainer_state.json"])
def test_a_damaged_file_is_found_and_named(tmp_path, damage, says, name):
    """One bit, one byte or the whole file."""
    folder = make_checkpoint(tmp_path, 7)
    damage(folder / name)
    _, problems = verify(folder)
    assert len(problems) == 1
    assert name in problems[0]
    assert says in problems[0]


def test_ranks_that_share_the_work_find_what_one_would(tmp_path):
    """Each file is looked at by exactly one of them."""
    folder = make_checkpoint(tmp_path, 7)
    manifest = read_manifest(folder)
    for name in manifest.files:
        damage_flip(folder / name)
    shared = [line for k in range(2) for line in check_files(folder, manifest, share=(k, 2))]
    assert sorted(shared) == sorted(check_files(folder, manifest))
    assert len(shared) == 4


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_bit_that_flips_in_the_manifest_is_found(tmp_path, position):
    """Wherever it is: as broken JSON, or by the manifest's own checksum."""
    folder = make_checkpoint(tmp_path, 7)
    content = bytearray((folder / NAME).read_bytes())
    content[int(len(content) * position)] ^= 1
    (folder / NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(folder)


def test_a_manifest_of_a_newer_version_is_refused(tmp_path):
    """It may mean other things by the same keys."""
    folder = make_checkpoint(tmp_path, 7)
    body = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**body, "version": 2}))
    with pytest.raises(CheckpointError, match=r"version 2.*\n.*up to 1"):
        read_manifest(folder)


def test_a_manifest_cannot_point_outside_of_its_folder(tmp_path):
    """A checkpoint may come from anywhere."""
    folder = make_checkpoint(tmp_path, 7)
    manifest = read_manifest(folder)
    record = manifest.files["trainer_state.json"]
    for name in ("../other", "/etc/passwd"):
        moved = {**vars(manifest), "files": {name: record}}
        write_manifest(folder, Manifest(**moved))
        with pytest.raises(CheckpointError, match="outside of its folder"):
            read_manifest(folder)


def test_elements_that_are_there_twice_are_counted(tmp_path):
    """Two files that both have a run, which nothing else would notice."""
    folder = make_checkpoint(tmp_path, 7)
    names = [f"state/rank-{rank:05d}.safetensors" for rank in (0, 1)]
    values = torch.arange(5000, dtype=torch.float32)
    tensors = [Stored.of("master/w", values[1000:]), Stored.of("exp_avg/w", -values[1000:])]
    metadata = {"spans": json.dumps({"w": [1000, 4000]}), "scalars": "{}"}
    files = dict(read_manifest(folder).files)
    files[names[1]] = write_tensor_file(folder / names[1], tensors, metadata)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=files))
    assert sorted(verify(folder)[1]) == [
        f"{key} of w: 666 elements are there twice or more" for key in ("exp_avg", "master")
    ]


def test_missing_elements_of_a_parameter_are_counted(tmp_path):
    """A rank's file that is whole but covers too little."""
    folder = make_checkpoint(tmp_path, 7)
    manifest = read_manifest(folder)
    larger = {**vars(manifest), "parameters": {"w": (501, 10)}}
    write_manifest(folder, Manifest(**larger))
    _, problems = verify(folder)
    assert sorted(problems) == [
        "exp_avg of w: 10 of 5010 elements are in no file",
        "master of w: 10 of 5010 elements are in no file",
    ]


# --- choosing ------------------------------------------------------------------------------------


def test_the_newest_that_verifies_is_chosen_and_the_reasons_are_said(tmp_path, caplog):
    """By step number, whatever the times; 1000 comes after 999."""
    kept = make_checkpoint(tmp_path, 900)
    flipped, cut = make_checkpoint(tmp_path, 999), make_checkpoint(tmp_path, 1000)
    os.utime(kept, (2**31, 2**31))
    damage_flip(flipped / "state/rank-00000.safetensors")
    damage_truncate(cut / NAME)
    (tmp_path / "checkpoint-2000").mkdir()  # another program's, or a copy that did not finish
    newer, lost = make_checkpoint(tmp_path, 1002), make_checkpoint(tmp_path, 1001)
    body = json.loads((newer / NAME).read_text())
    (newer / NAME).write_text(json.dumps({**body, "version": 2}))
    (lost / "state/rank-00001.safetensors").unlink()
    (kept / "notes.txt").write_text("a file that somebody put there does no harm")
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        chosen = choose_checkpoint(True, tmp_path, Ranks())
    assert chosen is not None
    assert chosen[0] == kept
    assert "checkpoint-900 has files that are no part of it: notes.txt" in caplog.text
    assert "checkpoint-1002 is skipped" in caplog.text
    assert "version 2: this dstrain reads versions up to 1" in caplog.text
    assert "checkpoint-1001 is skipped: state/rank-00001.safetensors is missing" in caplog.text
    assert "checkpoint-1000 is skipped" in caplog.text
    assert "checkpoint-999 is skipped: state/rank-00000.safetensors does not have" in caplog.text


def test_auto_starts_afresh_only_where_there_is_nothing(tmp_path):
    """A run whose checkpoints are all damaged must not quietly begin at step 0."""
    assert choose_checkpoint("auto", tmp_path, Ranks()) is None
    with pytest.raises(CheckpointError, match="there is none"):
        choose_checkpoint(True, tmp_path, Ranks())
    folder = make_checkpoint(tmp_path, 5)
    damage_flip(folder / "state/rank-00000.safetensors")
    for wanted in ("auto", True):
        with pytest.raises(CheckpointError, match="checkpoint-5: state/rank-00000"):
            choose_checkpoint(wanted, tmp_path, Ranks())


def test_a_named_folder_is_taken_or_refused_with_a_suggestion(tmp_path):
    """A typo in the number must not resume from another step."""
    folder = make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 9)
    chosen = choose_checkpoint(str(folder), tmp_path, Ranks())
    assert chosen is not None
    assert chosen[1].step == 5
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*(?s:.*)newest.*checkpoint-9"):
        choose_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path, Ranks())


def test_a_quick_look_finds_what_is_not_there(tmp_path):
    """Before data is read or a model is built; the files themselves are read later."""
    for given in (None, False, "false", "auto", "AUTO"):
        check_resumable(given, tmp_path)
    for given in (True, "true"):
        with pytest.raises(CheckpointError, match="there is none"):
            check_resumable(given, tmp_path)
    folder = make_checkpoint(tmp_path, 5)
    check_resumable(True, tmp_path)
    check_resumable(str(folder), tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"checkpoint-50.*(?s:.*)newest.*checkpoint-5'"):
        check_resumable(str(tmp_path / "checkpoint-50"), tmp_path)


# --- folders -------------------------------------------------------------------------------------


def steps(output_dir: Path) -> list[int]:
    return [found.step for found in folders.committed(output_dir)]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    """The best counts towards the limit, as documented, and the newest always stays."""
    made = {step: make_checkpoint(tmp_path, step) for step in (2, 4, 10, 20)}
    assert folders.rotate(tmp_path, limit=None, keep=[]) == []
    folders.rotate(tmp_path, limit=3, keep=[made[2]])
    assert steps(tmp_path) == [2, 10, 20]
    folders.rotate(tmp_path, limit=1, keep=[made[2]])
    assert steps(tmp_path) == [2, 20]
    folders.rotate(tmp_path, limit=1, keep=[])
    assert steps(tmp_path) == [20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20"]


def test_rotation_leaves_what_is_being_read(tmp_path, caplog):
    """A resume or an upload that is under way."""
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    with folders.holding(first), caplog.at_level(logging.WARNING, logger="dstrain"):
        folders.rotate(tmp_path, limit=1, keep=[])
        assert steps(tmp_path) == [1, 2]
    assert "is being read" in caplog.text
    folders.rotate(tmp_path, limit=1, keep=[])
    assert steps(tmp_path) == [2]


def test_a_removal_that_fails_is_a_warning(tmp_path, caplog, monkeypatch):
    """A full or read-only disk must not end the run."""
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="dstrain"):
        patch.setattr(os, "rename", refuse)
        assert folders.rotate(tmp_path, limit=1, keep=[]) == []
    assert "could not be removed: read-only" in caplog.text
    assert steps(tmp_path) == [1, 2]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="dstrain"):
        patch.setattr(shutil, "rmtree", refuse)
        folders.rotate(tmp_path, limit=1, keep=[])
    assert "could not be removed whole: read-only" in caplog.text
    assert steps(tmp_path) == [2]  # what is left of it is no checkpoint any more
    folders.recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_killed_runs_left_is_cleared_up(tmp_path):
    """Unfinished saves go; a checkpoint that was to be replaced comes back."""
    folders.new_staging(tmp_path, 3)
    old = make_checkpoint(tmp_path, 4)
    os.rename(old, tmp_path / ".checkpoint-4.replaced-0123abcd")
    gone = make_checkpoint(tmp_path, 5)
    os.rename(gone, tmp_path / ".checkpoint-5.removing-0123abcd")
    new = make_checkpoint(tmp_path, 6)
    replaced = make_checkpoint(tmp_path / "other", 6)
    os.rename(replaced, tmp_path / ".checkpoint-6.replaced-0123abcd")
    (tmp_path / "other").rmdir()
    marked = folders.new_staging(tmp_path, 7)
    with folders.holding(marked):
        folders.recover(tmp_path)
        assert marked.exists(), "somebody is writing there"
    folders.recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert verify(new)[1] == []


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    """A run that fell back to an older checkpoint comes by the same step again."""
    make_checkpoint(tmp_path, 4, size=100)
    folder = make_checkpoint(tmp_path, 4, size=200)
    assert read_manifest(folder).parameters == {"w": (20, 10)}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    """Two runs would rotate each other's checkpoints away."""
    lock, second = RunLock(tmp_path), RunLock(tmp_path)
    with lock.held():
        with open(tmp_path / RUN_LOCK) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(CheckpointError, match="another run"), second.held():
            pass
        with lock.held():  # the command and its training
            pass
        with pytest.raises(CheckpointError, match="another run"), second.held():
            pass
    with second.held():
        assert (tmp_path / RUN_LOCK).exists()
    assert not (tmp_path / RUN_LOCK).exists()  # it goes when the run has ended


def test_a_lock_whose_file_is_removed_is_taken_again(tmp_path, caplog):
    """By hand, say: another run must not slip in."""
    lock, second = RunLock(tmp_path), RunLock(tmp_path)
    with lock.held():
        (tmp_path / RUN_LOCK).unlink()
        lock.keep()
        with pytest.raises(CheckpointError, match="another run"), second.held():
            pass
        assert not caplog.records  # the folder is the same
        (tmp_path / RUN_LOCK).unlink()
        with second.held(), pytest.raises(CheckpointError, match="another run"):
            lock.keep()


# --- files ---------------------------------------------------------------------------------------


def test_tensor_files_are_what_safetensors_reads(tmp_path):
    """Every format, odd lengths, an empty and a scalar tensor, values bit for bit."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    draw = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=draw).to(torch.bfloat16),
        "a": torch.randn(7, generator=draw),
        "h": torch.randn(1, generator=draw).half(),
        "d": torch.randn(2, 2, generator=draw).double(),
        "i": torch.tensor([-(2**40), 3]),
        "u": torch.arange(5, dtype=torch.uint8),
        "t": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5),
        "slanted": torch.randn(4, 3, generator=draw).t(),
    }
    path = tmp_path / "x.safetensors"
    stored = [Stored.of(name, t) for name, t in tensors.items()]
    record = write_tensor_file(path, stored, {"format": "pt"})
    assert record == record_of(path)
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_runs_of_tensors_are_read_as_safetensors_reads_them(tmp_path):
    """The reader of slices against safetensors' own, on a file of each of the two writers."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.arange(11, dtype=torch.int64),
        "c": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"k": "v"})
    write_tensor_file(
        tmp_path / "ours", [Stored.of(n, t) for n, t in tensors.items()], metadata={"k": "v"}
    )
    for name in ("theirs", "ours"):
        path = tmp_path / name
        with TensorReader(path) as ours, safe_open(path, "pt") as theirs:
            assert ours.metadata == theirs.metadata() == {"k": "v"}
            assert sorted(ours.keys()) == sorted(theirs.keys())
            for key in ours.keys():  # noqa: SIM118 - a file is no dict
                whole = theirs.get_tensor(key).reshape(-1)
                assert ours.numel(key) == whole.numel()
                assert torch.equal(ours.read(key, 0, whole.numel()), whole)
                assert torch.equal(ours.read(key, 1, 3), whole[1:3]) or whole.numel() < 3


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_file_cut_short_is_no_file_of_tensors(tmp_path, keep):
    write_tensor_file(tmp_path / "x", [Stored.of("a", torch.randn(9))])
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:keep])
    with pytest.raises((ValueError, OSError)):
        TensorReader(tmp_path / "x")


def test_a_large_write_is_hashed_like_a_small_one(tmp_path):
    """Chunks and partial writes must not show."""
    content = random.Random(0).randbytes(40 * 2**20 + 3)
    record = write_bytes(tmp_path / "x", content)
    assert record == record_of(tmp_path / "x")
    assert record.size == len(content)
    assert (tmp_path / "x").read_bytes() == content


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], "b": {"c": ()}},
        (1, (2, [3, (4,)])),
        {1: "one", (2, 3): [4]},
        collections.Counter({5: 1, 30: 2}),
        {"__tuple__": "a dict that looks like one of ours"},
        b"\x00\xff",
        0.1 + 0.2,
        -math.inf,
    ],
)
def test_values_come_back_as_they_were(value):
    """Through real JSON, with their types."""
    back = decode(json.loads(json.dumps(encode(value, where="x"), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)


def test_nan_and_tensors_come_back(tmp_path):
    """Both are unequal to themselves or compare element by element."""
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, where="x")))))
    for tensor in (torch.randn(3, 2).bfloat16(), torch.empty(0), torch.tensor(7)):
        back = decode(json.loads(json.dumps(encode(tensor, where="x"))))
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)


def test_what_would_need_a_pickle_is_refused_with_its_place():
    """Schedules can hold functions."""
    with pytest.raises(CheckpointError, match=r"schedule\.lambdas\[1\] is a function"):
        encode({"lambdas": [None, lambda: 0]}, where="schedule")


def test_random_states_come_back():
    """Of all three generators, in the middle of numpy's pair of normal numbers."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    draw()
    state = decode(json.loads(json.dumps(encode(random_state(), where="x"))))
    expected = draw(), draw()
    set_random_state(state)
    assert (draw(), draw()) == expected


# --- killed at any moment ------------------------------------------------------------------------


def _save_until_killed(output_dir: Path, report: int, kill_at: int) -> None:
    """Save, rotate and save over; die by SIGKILL at file operation number ``kill_at``."""
    seen = itertools.count(1)

    counted = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}

    def hook(event: str, _: object) -> None:
        if event in counted and next(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step, size in ((1, 10), (2, 20), (3, 30), (3, 40)):
        make_checkpoint(output_dir, step, size=size)
        os.write(report, f"{step}:{size} ".encode())
        folders.rotate(output_dir, limit=1, keep=[])


def test_a_kill_at_any_file_operation_loses_nothing_that_was_committed(tmp_path):
    """Every moment of saving, replacing and rotating, one after another."""
    for kill_at in itertools.count(1):
        output_dir = tmp_path / str(kill_at)
        output_dir.mkdir()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_until_killed(output_dir, writer, kill_at)
            finally:
                os._exit(0)
        os.close(writer)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(reader) as pipe:
            reported = [tuple(map(int, word.split(":"))) for word in pipe.read().split()]
        folders.recover(output_dir)
        found = folders.committed(output_dir)
        for checkpoint in found:
            assert verify(checkpoint.folder)[1] == [], kill_at
        if reported:
            step, size = reported[-1]
            manifest = read_manifest(found[-1].folder)
            # The save after the last one reported may have been committed too.
            assert (manifest.step, manifest.parameters["w"][0] * 10) >= (step, size), kill_at
        leftovers = {p.name for p in output_dir.iterdir()} - {f.folder.name for f in found}
        assert leftovers == set(), kill_at
        shutil.rmtree(output_dir)
        if os.WIFEXITED(status):
            break
    assert kill_at > 60
