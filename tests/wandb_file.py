"""Offline runs of W&B, and what it has written of them: blocks of the LevelDB log format."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_BLOCK, _HEADER, _FILE_HEADER = 32768, 7, 7
_FULL, _LAST = 1, 4


def go_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let W&B write its runs into ``folder`` alone, whatever it was told before in this process."""
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")


def wait_until_written(file: Path, *, seconds: float = 20.0) -> None:
    """Wait until W&B's process has ended the file, milliseconds after ``finish`` returns."""
    deadline = time.monotonic() + seconds
    while not any(record.WhichOneof("record_type") == "exit" for record in records(file)):
        assert time.monotonic() < deadline, f"W&B has not ended {file}"
        time.sleep(0.05)


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file, in their order."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = file.read_bytes(), _FILE_HEADER, b""
    while position + _HEADER <= len(content):
        if _BLOCK - position % _BLOCK < _HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", content, position + 4)
        position += _HEADER
        parts += content[position : position + size]
        position += size
        if kind in (_FULL, _LAST):
            if position > len(content):
                return  # not whole yet
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(file: Path, name: str) -> list[float]:
    """Return every logged value of a figure."""
    found = []
    for record in records(file):
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            if key == name:
                found.append(json.loads(item.value_json))
    return found


def config(file: Path) -> dict[str, Any]:
    """Return the run's config, later values over earlier ones."""
    found = {}
    for record in records(file):
        updates = [*record.config.update, *record.run.config.update]
        found |= {
            (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in updates
        }
    return found
