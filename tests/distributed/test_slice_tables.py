"""The table of slices that a save writes, and the files that a resume opens for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer
from tests.models import tiny_llama

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "train": 16, "max_steps": 4}


def partly_frozen() -> torch.nn.Module:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_table_says_what_the_headers_say(tmp_path: Path, stage: int) -> None:
    """At stage 3 every parameter follows the rule; at the others each is listed once or twice."""
    from dstrain.checkpoint.manifest import read_manifest
    from dstrain.checkpoint.slice_index import check_coverage, read_index, table_from_headers

    trainer = make_trainer(tmp_path, model=partly_frozen(), stage=stage, **SETTINGS)
    trainer.train()
    trainer.close()
    folder = tmp_path / "checkpoint-4"
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    headers = table_from_headers(folder, manifest)
    for rank in range(2):
        assert index.table.of_rank(rank, index.shapes) == headers.of_rank(rank, index.shapes)
    assert index.scalars[next(n for n in manifest.optimized)]["step"] == 4
    assert check_coverage(index, manifest) == []
    assert (stage == 3) == (not index.table.runs)
    num_runs = sum(map(len, index.table.runs.values()))
    assert num_runs + len(index.table.even) <= len(manifest.parameters) + 3


@pytest.mark.ranks(3, timeout=300)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_opens_only_the_files_that_it_reads_from(
    tmp_path: Path, rank: int, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own in a resume at the same topology, besides the header of its share to verify."""
    from dstrain.checkpoint import load
    from dstrain.checkpoint.content import slice_file

    trainer = make_trainer(tmp_path, stage=stage, **SETTINGS)
    trainer.train()
    whole = losses(trainer)
    trainer.close()
    opened: list[str] = []
    reading = load.reading

    def noting(path: Path) -> Any:
        opened.append(path.name)
        return reading(path)

    monkeypatch.setattr(load, "reading", noting)
    again = make_trainer(tmp_path, stage=stage, **SETTINGS)
    again.train(str(tmp_path / "checkpoint-2"))
    assert set(opened) == {Path(slice_file(rank)).name}
    assert losses(again) == whole
    again.close()


@pytest.mark.ranks(2, timeout=300)
def test_slices_that_are_not_all_of_the_state_fail_the_save(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told when it is written, not weeks later in a resume; on all ranks."""
    from dstrain.checkpoint import content
    from dstrain.core.errors import CheckpointError

    locate = content.shards_to_write

    def all_but_one(*args: Any, **kwargs: Any) -> Any:
        return locate(*args, **kwargs)[rank:]

    monkeypatch.setattr(content, "shards_to_write", all_but_one)
    trainer = make_trainer(tmp_path, stage=3, save_async=False, **SETTINGS)
    with pytest.raises(CheckpointError, match="elements are in no file"):
        trainer.train()
    trainer.close()
    assert not list(tmp_path.glob("checkpoint-*"))
