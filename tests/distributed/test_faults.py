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
    """Mount a file system of that size at ``folder``; tell whether this machine allows it."""
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
                trainer.checkpoints.wait()  # else it could find the room still
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
        assert trainer.missing_checkpoints == (2, 3)
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
    from dstrain.checkpoint.folders import holding, new_staging
    from dstrain.checkpoint.run_lock import RUN_LOCK
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import barrier

    with contextlib.ExitStack() as other:
        if rank == 0:
            lock = other.enter_context(open(tmp_path / RUN_LOCK, "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            staging = new_staging(tmp_path, 3)
            other.enter_context(holding(staging))
        barrier()
        for settings in (SETTINGS, {**SETTINGS, "save_strategy": "no"}):
            trainer = make_trainer(tmp_path, **settings)
            with pytest.raises(CheckpointError, match="another run is writing into"):
                trainer.train()
        trainer = make_trainer(tmp_path, **SETTINGS)
        if rank == 0:
            assert staging.exists()
            lock.close()
        barrier()
        trainer.train()  # what a living process holds is left alone by the next run too
        trainer.close()
        barrier()
        if rank == 0:
            assert staging.exists()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("how", ["moved", "removed", "taken"])
def test_the_folder_goes_under_a_run(
    how: str, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made anew and said so; a run that has taken its place since ends this one."""
    from transformers import TrainerCallback

    from dstrain.checkpoint import committed
    from dstrain.checkpoint.run_lock import RUN_LOCK
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import barrier

    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    class TakeAway(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                trainer.checkpoints.wait()
                barrier()
                if rank == 0:
                    if how == "moved":
                        folder.rename(elsewhere)
                    else:
                        shutil.rmtree(folder)
                    if how == "taken":
                        folder.mkdir()
                        other.append(open(folder / RUN_LOCK, "ab"))  # noqa: SIM115
                        fcntl.flock(other[0], fcntl.LOCK_EX)

    other: list[Any] = []
    trainer = make_trainer(folder, callbacks=[TakeAway], **SETTINGS)
    if how == "taken":
        with pytest.raises(CheckpointError, match="another run is writing into"):
            trainer.train()
        assert committed(folder) == []
    else:
        trainer.train()
        assert [f.step for f in committed(folder)] == [3, 4]
        if rank == 0:
            said = [r.getMessage() for r in caplog.records if "made anew" in r.getMessage()]
            assert len(said) == 1
            assert (f"moved to {elsewhere}" if how == "moved" else "removed") in said[0]
        if how == "moved":
            assert [f.step for f in committed(elsewhere)] == [1, 2]
    barrier()
    for file in other:
        file.close()
    if how != "taken":
        assert not (folder / RUN_LOCK).exists()  # the run has ended
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_folder_goes_while_a_checkpoint_is_written(
    asynchronous: bool, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written once more; in the background, where training has gone on, it is missing."""
    from dstrain.checkpoint import committed, folders
    from dstrain.core.ranks import barrier

    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    commit = folders.commit

    def moved_first(path: Path, output_dir: Path, step: int) -> Any:
        if step == 3 and not elsewhere.exists():
            folder.rename(elsewhere)
        return commit(path, output_dir, step)

    monkeypatch.setattr(folders, "commit", moved_first)  # by rank 0 alone
    trainer = make_trainer(folder, **{**SETTINGS, "save_async": asynchronous})
    assert trainer.train().global_step == 4
    assert trainer.missing_checkpoints == ((3,) if asynchronous else ())
    barrier()
    assert [f.step for f in committed(elsewhere)] == [1, 2]
    assert [f.step for f in committed(folder)] == ([4] if asynchronous else [3, 4])
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_what_is_missing_is_said_at_the_end(
    tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the log, in the figures, where the command ends, and in its exit status."""
    from transformers import TrainerCallback

    from dstrain.core.stop import INCOMPLETE
    from dstrain.tasks.common.job import train_and_report

    taken = 4

    class Occupy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == 0:  # a folder of the user's: the commit refuses
                folder = Path(args.output_dir) / f"checkpoint-{taken}"
                folder.mkdir()
                (folder / "mine").touch()

    trainer = make_trainer(tmp_path, save_failure="continue", callbacks=[Occupy], **SETTINGS)
    assert train_and_report(trainer, figures=()) == INCOMPLETE
    assert trainer.missing_checkpoints == (4,)
    assert trainer.last_save_failed
    said = capsys.readouterr().out
    line = "1 checkpoint could not be written (step 4), that of the last save among them"
    assert (line in said) == (rank == 0)
    assert '"missing_checkpoints": 1' in (tmp_path / "train_results.json").read_text()
    assert (tmp_path / "model.safetensors").exists()
    trainer.close()
    taken = 2
    trainer = make_trainer(
        tmp_path / "second", save_failure="continue", callbacks=[Occupy], **SETTINGS
    )
    trainer.train()
    assert trainer.missing_checkpoints == (2,)
    assert not trainer.last_save_failed
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_fails_on_the_main_rank_alone_is_known_to_all(
    asynchronous: bool, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """After the commit of a checkpoint it is there all the same; before it, it is not."""
    from dstrain import Trainer
    from dstrain.checkpoint import committed
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import gather_objects

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            if Path(folder).name.startswith(".checkpoint-2"):
                raise KeyError("of a tokenizer")

    class Uploads(Trainer):
        def checkpoint_upload(self) -> Any:
            def upload(folder: Path) -> None:
                raise RuntimeError(f"no way from {folder.name}")

            return upload if rank == 0 else None

    folder = tmp_path / "run"
    settings = {**SETTINGS, "save_async": asynchronous, "max_steps": 3}
    trainer = make_trainer(folder, cls=Uploads, save_failure="continue", **settings)
    trainer.processing_class = Tokenizer()
    trainer.train()
    trainer.close()
    assert gather_objects(trainer.missing_checkpoints) == [(2,), (2,)]
    assert [f.step for f in committed(folder)] == [1, 3]
    said = [r.getMessage() for r in caplog.records]
    assert ("checkpoint-3 is saved, but what was to follow failed: RuntimeError: no way from "
            "checkpoint-3" in said) == (rank == 0)  # fmt: skip
    trainer = make_trainer(tmp_path / "other", cls=Uploads, **settings)
    trainer.processing_class = Tokenizer()
    with pytest.raises(CheckpointError, match="KeyError: 'of a tokenizer'"):
        trainer.train()
    trainer.close()
