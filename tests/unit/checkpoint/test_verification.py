"""Manifests, the verification of checkpoints, and the choice of one to resume from."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.find import check_resumable, choose_checkpoint, verify
from dstrain.checkpoint.manifest import (
    NAME,
    Manifest,
    check_files,
    extra_files,
    read_manifest,
    write_manifest,
)
from dstrain.core.errors import CheckpointError
from dstrain.core.files import record_of
from dstrain.core.ranks import Ranks
from dstrain.models.tensor_file import Stored, write_tensor_file
from tests.unit.checkpoint.small import make_checkpoint


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


def test_a_folder_that_is_not_there_is_no_save_that_did_not_finish(tmp_path):
    """A name that was typed wrongly."""
    with pytest.raises(CheckpointError, match="there is no such folder") as caught:
        read_manifest(tmp_path / "checkpoint-7")
    assert "did not finish" not in str(caught.value)
