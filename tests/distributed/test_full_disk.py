"""A disk that is full: one error with path and room, on all ranks; what was there stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.core.errors import DstrainError
from dstrain.core.ranks import barrier
from tests.distributed.runs import make_trainer

SIZE = 256 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give both ranks a disk of 256 KiB, which takes root to mount."""
    disk = tmp_path / "disk"
    if os.environ.get("RANK", "0") == "0":
        disk.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
        subprocess.run(command, capture_output=True, check=False)
    barrier()
    mounted = os.path.ismount(disk)
    barrier()
    if not mounted:
        pytest.skip("no disk can be mounted here")
    yield disk
    barrier()
    if os.environ.get("RANK", "0") == "0":
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave no room on it."""
    with open(disk / "filling", "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass


@pytest.mark.ranks(2)
def test_a_full_disk_at_start_is_one_error(small_disk: Path, rank: int) -> None:
    """The resolved config is the first file; that of an earlier run stays whole."""
    (small_disk / "out").mkdir(exist_ok=True)
    trainer = make_trainer(small_disk / "out", stage=1, max_steps=1, save_strategy="no")
    barrier()
    record = small_disk / "out" / "resolved_config.json"
    if rank == 0:
        record.write_text('{"of": "an earlier run"}')
        fill(small_disk)
    barrier()
    with pytest.raises(DstrainError, match=r"resolved_config.json cannot be written") as caught:
        trainer.train()
    said = str(caught.value)
    assert "No space left on device; 0 bytes are free on the disk of" in said
    assert "fix: free space there" in said
    barrier()
    assert json.loads(record.read_text()) == {"of": "an earlier run"}
    assert not list((small_disk / "out").glob(".*.partial"))
    trainer.close()


@pytest.mark.ranks(2)
def test_records_and_the_model_say_that_the_disk_is_full(small_disk: Path, rank: int) -> None:
    """After training: metrics, state and tokenizer; the model on all ranks alike."""
    from tests.distributed.test_hub import Tokenizer

    trainer = make_trainer(small_disk / "out", stage=1, max_steps=1)
    trainer.train()
    trainer.save_metrics("train", {"train_loss": 1.0})
    barrier()
    if rank == 0:
        fill(small_disk)
    barrier()
    with pytest.raises(DstrainError, match="No space left on device; 0 bytes are free"):
        trainer.save_model()
    barrier()
    if rank == 0:
        results = small_disk / "out" / "train_results.json"
        for act in (
            trainer.save_state,
            lambda: trainer.save_metrics("train", {"train_loss": 2.0, "text": "x" * 9000}),
            trainer.create_model_card,
        ):
            with pytest.raises(DstrainError, match="cannot be written(.|\n)*0 bytes are free"):
                act()
        assert json.loads(results.read_text()) == {"train_loss": 1.0}
    barrier()
    trainer.processing_class = Tokenizer()
    trainer.close()
