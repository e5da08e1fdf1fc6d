"""What disks and other runs do to checkpoints, for real."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import make_trainer

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "evaluation": 0}


@contextlib.contextmanager
def small_disk(folder: Path, rank: int, *, megabytes: int) -> Iterator[bool]:
    """A file system of that size at ``folder``; whether this machine lets us have one."""
    from dstrain.core.ranks import barrier, gather_objects

    mounted = False
    if rank == 0:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        with contextlib.suppress(OSError):
            mounted = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    try:
        yield gather_objects(mounted)[0]
        barrier()
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full(
    asynchronous: bool, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for one checkpoint and a half: reported once, nothing left over, later saves work."""
    from transformers import TrainerCallback

    from dstrain.checkpoint import committed, verify
    from dstrain.core.errors import CheckpointError

    class MakeRoom(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                trainer._writer.wait()  # else it could find the room still
                if rank == 0:
                    shutil.rmtree(Path(args.output_dir) / "checkpoint-1")

    with small_disk(tmp_path / "disk", rank, megabytes=3) as there:
        if not there:
            pytest.skip("no right to mount a file system")
        folder = tmp_path / "disk/run"
        settings = {**SETTINGS, "save_async": asynchronous}
        trainer = make_trainer(
            folder, save_failure="continue", callbacks=[MakeRoom], **settings
        )  # fmt: skip
        trainer.train()
        trainer.close()
        assert [f.step for f in committed(folder)] == [4]
        assert verify(committed(folder)[0].folder)[1] == []
        assert not list(folder.glob(".checkpoint*"))
        said = [r.getMessage() for r in caplog.records if "was not written" in r.getMessage()]
        assert len(said) == (2 if rank == 0 else 0)
        assert all("No space left on device" in text for text in said)
        trainer = make_trainer(folder, **{**settings, "max_steps": 6})
        with pytest.raises(CheckpointError, match="No space left on device"):
            trainer.train(True)
        trainer.close()
        assert [f.step for f in committed(folder)] == [4]
        assert not list(folder.glob(".checkpoint*"))


@pytest.mark.ranks(2, timeout=300)
def test_another_run_in_the_same_folder(tmp_path: Path, rank: int) -> None:
    """Refused on all ranks before anything is touched; what the other one writes stays."""
    from dstrain.checkpoint.folders import RUN_LOCK, holding, new_staging
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import barrier

    with contextlib.ExitStack() as other:
        if rank == 0:
            lock = other.enter_context(open(tmp_path / RUN_LOCK, "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            staging = new_staging(tmp_path, 3)
            other.enter_context(holding(staging))
        barrier()
        trainer = make_trainer(tmp_path, **SETTINGS)
        with pytest.raises(CheckpointError, match="another run is writing checkpoints"):
            trainer.train()
        if rank == 0:
            assert staging.exists()
            lock.close()
        barrier()
        trainer.train()  # what a living process holds is left alone by the next run too
        trainer.close()
        barrier()
        if rank == 0:
            assert staging.exists()
