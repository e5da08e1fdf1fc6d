"""Whose data a folder is: what dstrain has not made is never removed, renamed or overwritten."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint import export, folders, new_folder, prune, verify
from dstrain.checkpoint.manifest import NAME, is_dstrain_checkpoint
from dstrain.core.errors import CheckpointError
from tests.unit.checkpoint.small import make_checkpoint

ODD = ["checkpoint-0006", "checkpoint-٧", "checkpoint-5\n", "checkpoint-5 ", "checkpoint-+5",
       "checkpoint-5.bak", "checkpoint-", "checkpoint--5", "Checkpoint-5"]  # fmt: skip


def theirs(folder: Path, **files: str) -> Path:
    """Make a folder of the user's."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def content_of(root: Path) -> dict[str, Any]:
    """Read everything below a folder."""
    return {
        str(p.relative_to(root)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def kept_beside(output_dir: Path, step: int) -> Path:
    (kept,) = output_dir.glob(f"checkpoint-{step}.kept-*")
    return kept


@pytest.mark.parametrize(
    "files",
    [{}, {"notes_txt": "mine"}, {"manifest_json": '{"name": "a web page"}', "notes_txt": "mine"},
     {"manifest_json": ""}],
    ids=str,
)  # fmt: skip
def test_a_folder_of_the_users_own_is_left_and_the_checkpoint_kept_beside_it(tmp_path, files):
    """Committing step 100 once removed it without a word."""
    folder = theirs(tmp_path / "checkpoint-100", **files)
    before = content_of(folder)
    with pytest.raises(CheckpointError, match="checkpoint-100 is no checkpoint") as error:
        make_checkpoint(tmp_path, 100)
    kept = kept_beside(tmp_path, 100)
    assert str(kept) in str(error.value)
    assert content_of(folder) == before
    assert folder.is_dir()
    assert verify(kept)[1] == []
    folders.recover(tmp_path)
    make_checkpoint(tmp_path, 200)
    make_checkpoint(tmp_path, 300)
    folders.rotate(tmp_path, limit=1, keep=[])
    prune(tmp_path, keep=1)
    assert verify(kept)[1] == []
    assert content_of(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-100", kept.name, "checkpoint-300",
    ]  # fmt: skip


def test_a_file_or_a_link_that_leads_nowhere_has_the_place(tmp_path):
    (tmp_path / "checkpoint-1").write_text("mine")
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "not there")
    for step, says in ((1, "it is a file"), (2, "it is a symbolic link")):
        with pytest.raises(CheckpointError, match=says):
            make_checkpoint(tmp_path, step)
        assert verify(kept_beside(tmp_path, step))[1] == []
    assert (tmp_path / "checkpoint-1").read_text() == "mine"
    assert (tmp_path / "checkpoint-2").is_symlink()


def test_the_start_of_a_run_says_what_is_in_the_way(tmp_path, caplog):
    theirs(tmp_path / "checkpoint-100", notes_txt="mine")
    make_checkpoint(tmp_path, 200)
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        folders.recover(tmp_path)
    (said,) = caplog.messages
    assert "checkpoint-100 is no checkpoint of dstrain's (it has no manifest.json)" in said


def test_a_damaged_checkpoint_of_ours_is_replaced(tmp_path):
    """A run that fell back to an older one comes by the same step again."""
    for damage in (b"", b"\0" * 500, None):
        folder = make_checkpoint(tmp_path, 4)
        content = (folder / NAME).read_bytes()
        (folder / NAME).write_bytes(content[:200] if damage is None else damage)
        assert is_dstrain_checkpoint(folder)
        assert verify(make_checkpoint(tmp_path, 4))[1] == []
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_other_names_are_no_checkpoints(tmp_path, name):
    """Not listed, resumed from, rotated away or pruned."""
    make_checkpoint(tmp_path, 5)
    os.rename(tmp_path / "checkpoint-5", tmp_path / name)
    before = content_of(tmp_path / name)
    for step in (7, 8, 9):
        make_checkpoint(tmp_path, step)
    assert [f.step for f in folders.committed(tmp_path)] == [7, 8, 9]
    folders.rotate(tmp_path, limit=2, keep=[])
    prune(tmp_path, keep=1)
    folders.recover(tmp_path)
    assert [f.step for f in folders.committed(tmp_path)] == [9]
    assert content_of(tmp_path / name) == before


# --- links ---------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Give a run whose first checkpoint is on another disk, with a link in its place."""
    run = tmp_path / "run"
    make_checkpoint(run, 1)
    (tmp_path / "archive").mkdir()
    os.rename(run / "checkpoint-1", tmp_path / "archive/checkpoint-1")
    (run / "checkpoint-1").symlink_to(tmp_path / "archive/checkpoint-1")
    for step in (2, 3):
        make_checkpoint(run, step)
    return run


def test_a_link_is_neither_counted_nor_removed_nor_followed(linked, caplog):
    before = content_of(linked.parent / "archive")
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        assert folders.rotate(linked, limit=2, keep=[]) == []
        assert [p.name for p in folders.rotate(linked, limit=1, keep=[])] == ["checkpoint-2"]
        make_checkpoint(linked, 4)
        done = prune(linked, keep=1)
        folders.recover(linked)
        folders.recover(linked)
    assert [f.step for f in done.removed] == [3]
    assert {f.step: why for f, why in done.kept} == {1: "dstrain has not made it", 4: "newest"}
    assert sorted(p.name for p in linked.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    assert (linked / "checkpoint-1").is_symlink()
    assert content_of(linked.parent / "archive") == before
    assert [m for m in caplog.messages if "could not be removed" in m] == []


def test_a_link_is_a_checkpoint_to_resume_from(linked):
    assert [f.step for f in folders.committed(linked)] == [1, 2, 3]
    assert verify(linked / "checkpoint-1")[1] == []


def test_the_step_of_a_link_is_kept_beside_it(linked):
    with pytest.raises(CheckpointError, match="it is a symbolic link"):
        make_checkpoint(linked, 1)
    assert verify(kept_beside(linked, 1))[1] == []
    assert (linked / "checkpoint-1").is_symlink()


def test_a_hidden_link_that_an_older_version_left_goes_once(linked, caplog):
    before = content_of(linked.parent / "archive")
    os.rename(linked / "checkpoint-1", linked / ".checkpoint-1.removing-0123abcd")
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        folders.recover(linked)
        caplog.clear()
        folders.recover(linked)
    assert caplog.messages == []
    assert not os.path.lexists(linked / ".checkpoint-1.removing-0123abcd")
    assert content_of(linked.parent / "archive") == before


# --- hidden names --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["replaced", "removing", "writing"])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_hidden_folder_of_the_users_is_neither_put_back_nor_removed(
    tmp_path, caplog, kind, has_checkpoint
):
    """One with a note in it once became checkpoint-1."""
    if has_checkpoint:
        make_checkpoint(tmp_path, 1)
    folder = theirs(tmp_path / f".checkpoint-1.{kind}-deadbeef", notes_txt="mine")
    before = content_of(folder)
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        folders.recover(tmp_path)
    assert content_of(folder) == before
    assert (tmp_path / "checkpoint-1").exists() == has_checkpoint
    (said,) = caplog.messages
    assert f"{folder} is left as it is" in said


@pytest.mark.parametrize("kind", ["replaced", "removing"])
def test_a_state_alone_is_no_checkpoint_that_was_to_go(tmp_path, kind):
    """Such a name dstrain gives to whole checkpoints alone."""
    folder = theirs(tmp_path / f".checkpoint-1.{kind}-deadbeef/state", run_json="{}").parent
    folders.recover(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "state/run.json").exists()


def test_a_removal_that_is_killed_at_any_file_is_ended_later(tmp_path, monkeypatch):
    """What is left of a checkpoint is known as one until the last file."""
    import shutil

    names = sorted(p.name for p in make_checkpoint(tmp_path, 1).iterdir())
    assert len(names) > 2
    unlink, rmtree = Path.unlink, shutil.rmtree
    for killed_after in range(len(names)):
        hidden = tmp_path / ".checkpoint-1.removing-0123abcd"
        os.rename(make_checkpoint(tmp_path, 1), hidden)
        left = [killed_after]

        def count(left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda p, missing_ok=False: (count(), unlink(p)))
            patch.setattr(shutil, "rmtree", lambda p: (count(), rmtree(p)))
            with pytest.raises(KeyboardInterrupt):
                folders.recover(tmp_path)
        folders.recover(tmp_path)
        assert list(tmp_path.iterdir()) == []


# --- what is made whole --------------------------------------------------------------------------


def test_a_folder_that_is_filled_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with new_folder.filled_atomically(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real/a").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "real"]


def test_the_current_folder_is_filled_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder.filled_atomically(Path()) as staging:
        (staging / "a").write_text("1")
    assert [p.name for p in Path().iterdir()] == ["a"]
    with (
        pytest.raises(ValueError, match="broken"),
        new_folder.filled_atomically(tmp_path / "b") as staging,
    ):
        raise ValueError("broken")
    assert [p.name for p in Path().iterdir()] == ["a"]


def test_what_came_into_the_folder_meanwhile_is_not_overwritten(tmp_path):
    def make() -> None:
        with new_folder.filled_atomically(tmp_path / "out") as staging:
            (staging / "a").write_text("1")
            theirs(tmp_path / "out", notes_txt="mine")

    with pytest.raises(CheckpointError, match="out' cannot be written\n.*not empty"):
        make()
    assert content_of(tmp_path) == {"out/notes.txt": b"mine"}


# --- a damaged checkpoint makes no result --------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("action", ["export", "convert", "diff"])
def test_a_flipped_bit_ends_with_an_error_and_no_result(tmp_path, action, capsys):
    """They once exited with 0 and had written 1.7e37."""
    from dstrain.cli.main import main

    one, other = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    words = {
        "export": ["export", str(other), str(tmp_path / "out")],
        "convert": ["convert", str(other), str(tmp_path / "out"), "--to", "deepspeed"],
        "diff": ["diff", str(one), str(other)],
    }[action]
    flip(other / "state/rank-00001.safetensors")
    assert main(["checkpoint", *words]) == 2
    said = capsys.readouterr().err
    assert "state/rank-00001.safetensors does not have its checksum" in said
    assert "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_an_export_reads_and_verifies_what_it_needs_alone(tmp_path):
    """Slices are not read where the model's own files are taken as they are."""
    import dataclasses

    import torch

    from dstrain.checkpoint import read_manifest
    from dstrain.checkpoint.manifest import write_manifest
    from dstrain.models import Stored, write_tensor_file

    folder = make_checkpoint(tmp_path, 1)
    tensors = [Stored.of("other", torch.ones(3).bfloat16())]
    record = write_tensor_file(folder / "model.safetensors", tensors, {"format": "pt"})
    manifest = read_manifest(folder)
    manifest = dataclasses.replace(
        manifest, has_weights=True, files={**manifest.files, "model.safetensors": record}
    )
    write_manifest(folder, manifest)
    flip(folder / "state/rank-00001.safetensors")
    read: list[int] = []
    assert export(folder, tmp_path / "out", on_file=read.append) == 1
    run = manifest.files["state/run.json"]  # it says what a saved model has no place for
    assert read == [run.size, record.size]
    flip(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not have its checksum"):
        export(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
