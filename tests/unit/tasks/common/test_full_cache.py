"""A full disk under the data cache is no fault of the data, and is said with path and room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from dstrain.core.errors import DataError
from dstrain.core.ranks import Ranks
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.data import prepare_data
from dstrain.tasks.common.cache import cache_problem
from tests.cli.corpus import text


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a cache on a disk of 256 KiB, which takes root to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_a_full_cache_says_so(suffix: str, small_cache: Path, tmp_path: Path) -> None:
    """Whichever library meets it first."""
    lines = [line.strip() for seed in range(80) for line in text(seed).splitlines()]
    file = tmp_path / f"corpus.{suffix}"
    if suffix == "txt":
        file.write_text("\n".join(lines))
    elif suffix == "jsonl":
        file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    else:
        file.write_text("text\n" + "\n".join(lines))
    with open(small_cache / "filling", "wb", buffering=0) as filling:
        filling.write(b"x" * (200 << 10))
    args = DataArguments(train_file=str(file), vocab_size=300, block_size=32)
    with pytest.raises(DataError) as caught:
        prepare_data(args, None, Ranks())
    said = str(caught.value)
    assert f"the data cache at {small_cache}" in said or f"the data cache {small_cache}" in said
    assert "bytes are free on the disk of" in said
    assert "HF_DATASETS_CACHE" in said
    assert "mend" not in said


def test_only_failures_of_the_cache_are_taken_for_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as the cause of another error; a file of data that cannot be read is none."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert cache_problem(ValueError("no such column")) is None
    assert cache_problem(PermissionError(13, "Permission denied", "/data/a.txt")) is None
    refused = PermissionError(13, "Permission denied", os.fspath(tmp_path / "a.arrow"))
    assert "Permission denied" in str(cache_problem(refused))
    for name in (7, b"", None):  # a file that was opened by its descriptor has a number
        full = OSError(28, "No space left on device", name)
        assert f"the data cache at {tmp_path}" in str(cache_problem(full))
        assert cache_problem(OSError(5, "Input/output error", name)) is None
    outer = RuntimeError("generating failed")
    outer.__cause__ = Exception("No space left on device (os error 28)")
    assert "bytes are free" in str(cache_problem(outer))
