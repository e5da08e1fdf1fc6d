"""Who may have pickles executed: nobody but a user who says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dstrain.checkpoint import (
    convert,
    export,
    folders,
    import_checkpoint,
    read_manifest,
    verify,
)
from dstrain.checkpoint.native import Reader, check_readable, unpickling
from dstrain.core.errors import CheckpointError
from tests.unit.checkpoint.forged import relist, resumed, whole, with_pickle


@pytest.mark.parametrize("layout", ["x", "", "Deepspeed", "deepspeed\n"])
def test_an_unknown_layout_is_no_checkpoint(folder, tmp_path, layout):
    older = whole(folder.parent, 2)
    with_pickle(folder, tmp_path / "marker", layout)
    with pytest.raises(CheckpointError, match="layout"):
        verify(folder)
    assert resumed(folder.parent) == older.name
    for act in (export, convert):
        with pytest.raises(CheckpointError, match="layout"):
            act(folder, tmp_path / "out")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()


def test_only_the_users_word_lets_deepspeed_unpickle(folder, tmp_path):
    with_pickle(folder, tmp_path / "marker", "deepspeed")
    manifest = read_manifest(folder)
    for make in (check_readable, unpickling):
        with pytest.raises(CheckpointError, match="executes the pickles"):
            make(folder, manifest, Reader(False, 1, 2, "bf16"))
    trusted = Reader(True, 1, 2, "bf16")
    assert unpickling(folder, manifest, trusted).tag == "global_step4"
    (folder / "global_step4/more_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="more_states"):
        unpickling(folder, manifest, trusted)
    sliced = dataclasses.replace(manifest, layout="slices")
    with pytest.raises(CheckpointError):
        unpickling(folder, sliced, trusted)
    assert not (tmp_path / "marker").exists()


def test_an_import_verifies_what_has_checksums_and_executes_nothing(folder, tmp_path):
    with_pickle(folder, tmp_path / "marker", "deepspeed")
    (folder / "latest").write_text("global_step4")
    relist(folder, "latest")
    with pytest.raises(CheckpointError, match="is not loaded|cannot be read"):
        import_checkpoint(folder, tmp_path / "out")
    path = folder / "global_step4/mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        import_checkpoint(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_leave_to_unpickle_is_made_in_one_place():
    """The loader takes nothing else, so no comparison of texts can be fallen through."""
    root = Path(folders.__file__).parents[1]
    makers = [p for p in root.rglob("*.py") if "Unpickling(" in p.read_text()]
    callers = [p for p in root.rglob("*.py") if "load_native(" in p.read_text()]
    assert [p.relative_to(root).as_posix() for p in makers] == ["checkpoint/native.py"]
    assert sorted(p.relative_to(root).as_posix() for p in callers) == [
        "checkpoint/load.py", "engine/state/training_state.py",
    ]  # fmt: skip
