"""The index of the slices in a checkpoint's files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator

import pytest
import torch

from dstrain.checkpoint import choose_checkpoint, folders, slice_headers
from dstrain.checkpoint.content import TABLE, metadata_of, slice_file
from dstrain.checkpoint.manifest import NAME, Manifest, read_manifest
from dstrain.checkpoint.slice_index import (
    SliceIndex,
    check_coverage,
    header_faults,
    read_index,
    table_from_headers,
)
from dstrain.checkpoint.slice_table import (
    RankSlices,
    Run,
    SliceTable,
    even_run,
    table_of,
    uncovered,
)
from dstrain.checkpoint.table_file import read_table, write_table
from dstrain.core.errors import CheckpointError
from dstrain.core.ranks import Ranks
from dstrain.engine import MASTER, WEIGHT
from dstrain.models import Stored, write_tensor_file
from tests.unit.checkpoint.forged import forge, forge_header, relist

ADAM = ("exp_avg", "exp_avg_sq", MASTER)
SHAPES = {f"layers.{i}.weight": (i % 7, 3, i) for i in range(30)} | {"scale": (), "bias": (2,)}


def numel(name: str) -> int:
    return torch.Size(SHAPES[name]).numel()


def divided(how: str, world_size: int, draw: random.Random) -> list[RankSlices]:
    """Divide the parameters as a ZeRO stage does: "each", or "joined" one after another."""
    spans: list[dict[str, tuple[int, int]]] = [{} for _ in range(world_size)]
    frozen = {name for name in SHAPES if draw.random() < 0.2}
    total = sum(map(numel, SHAPES))
    size, position = -(-total // world_size), 0
    for name in SHAPES:
        for rank in range(world_size):
            start, count = even_run(numel(name), world_size, rank)
            if how == "joined":
                start = min(max(rank * size - position, 0), numel(name))
                count = max(min((rank + 1) * size - position, numel(name)) - start, 0)
            if count:
                spans[rank][name] = start, count
        position += numel(name)
    keys = {name: (WEIGHT,) if name in frozen else ADAM for name in SHAPES}
    steps = {name: {"step": draw.choice((3.0, 4.0))} for name in SHAPES if name not in frozen}
    return [
        RankSlices(s, {n: keys[n] for n in s}, {n: v for n, v in steps.items() if n in s})
        for s in spans
    ]


@pytest.mark.parametrize("how", ["each", "joined"])
@pytest.mark.parametrize("world_size", [1, 2, 5, 64])
def test_the_table_has_what_the_ranks_have(tmp_path, how, world_size):
    """After it was written and read too; at any part of a parameter."""
    draw = random.Random(world_size)
    parts = divided(how, world_size, draw)
    made = table_of(enumerate(parts), SHAPES, world_size)
    write_table(tmp_path / "table", made, SHAPES)
    table = read_table(tmp_path / "table", world_size, SHAPES)
    assert table == made
    if how == "each":
        assert not table.runs
        assert set(table.even) == {name for name in SHAPES if numel(name)}
    else:
        assert sum(map(len, table.runs.values())) <= len(SHAPES) + world_size
    assert list(uncovered(table, SHAPES, set(SHAPES), ignore_copies=False)) == []
    assert [table.of_rank(rank, SHAPES) for rank in range(world_size)] == parts
    index = SliceIndex(tmp_path, table, SHAPES)
    for name in SHAPES:
        for key in (MASTER, WEIGHT):
            start = draw.randrange(numel(name) + 1)
            stop = draw.randrange(start, numel(name) + 1)
            wanted = [
                (*part.spans[name], tmp_path / slice_file(rank))
                for rank, part in enumerate(parts)
                if name in part.spans and key in part.keys[name]
                and part.spans[name][0] < stop and sum(part.spans[name]) > start
            ] if start < stop else []  # fmt: skip
            found = index.pieces(key, name, start, stop)
            assert [(p.start, p.numel, p.path) for p in found] == wanted


def test_a_rank_that_differs_is_listed_and_what_is_missing_is_told():
    """List a rank in the middle that lacks a part, and then has one that another rank has too."""
    parts = divided("each", 4, random.Random(0))
    spans = dict(parts[2].spans)
    name = "layers.13.weight"
    start, count = spans[name]
    spans[name] = start + 5, count - 5
    parts[2] = RankSlices(spans, parts[2].keys, parts[2].scalars)
    table = table_of(enumerate(parts), SHAPES, 4)
    assert list(table.runs) == [name]
    assert [run.rank for run in table.runs[name]] == [0, 1, 2, 3]
    lines = list(uncovered(table, SHAPES, set(SHAPES), ignore_copies=False))
    assert lines == [f"{k} of {name}: 5 of {numel(name)} elements are in no file" for k in ADAM]
    spans[name] = start - 5, count + 5
    table = table_of(enumerate(parts), SHAPES, 4)
    lines = list(uncovered(table, SHAPES, set(SHAPES), ignore_copies=False))
    assert lines == [f"{k} of {name}: 5 elements are there twice or more" for k in ADAM]
    assert list(uncovered(table, SHAPES, set(SHAPES), ignore_copies=True)) == []


def test_a_rank_without_a_file_leaves_a_gap():
    parts = divided("each", 4, random.Random(0))
    table = table_of([(rank, parts[rank]) for rank in (0, 1, 3)], SHAPES, 4)
    lines = list(uncovered(table, SHAPES, set(SHAPES), ignore_copies=False))
    assert len({line.split(":")[0].split(" of ")[1] for line in lines}) == len(parts[2].spans)


def test_missing_elements_are_counted_between_overlapping_pieces(tmp_path):
    runs = [Run(0, 4, 0, 0), Run(2, 4, 1, 0), Run(8, 2, 2, 0)]
    table = SliceTable(3, ((MASTER,),), {}, {"w": runs})
    index = SliceIndex(tmp_path, table, {"w": (12,), "v": (3,)})
    assert index.missing(MASTER, "w", 0, 12) == 4
    assert index.missing(MASTER, "w", 1, 6) == 0
    assert index.missing(MASTER, "v", 0, 3) == 3


# --- in a folder ----------------------------------------------------------------------------------


def test_the_table_is_used_and_no_header_is_read(folder, monkeypatch):
    monkeypatch.setattr(slice_headers, "reading", None)  # not to be called
    index = read_index(folder, read_manifest(folder))
    assert index.keys_of("w") == ["exp_avg", MASTER]
    assert index.scalars == {"w": {"step": 4}}


def test_a_checkpoint_without_a_table_is_indexed_from_its_headers(folder):
    with_table = read_index(folder, read_manifest(folder))
    (folder / TABLE).unlink()
    forge(folder, NAME, lambda body: body | {"files": without(body["files"], TABLE)})
    index = read_index(folder, read_manifest(folder))
    assert index.pieces(MASTER, "w") == with_table.pieces(MASTER, "w")
    assert index.scalars == with_table.scalars
    assert choose_checkpoint(True, folder.parent, Ranks()) is not None


def without(files: dict, name: str) -> dict:
    return {n: record for n, record in files.items() if n != name}


def test_a_header_that_contradicts_the_table_is_a_fault_of_the_checkpoint(folder):
    """It has half of the parameter, and says so."""
    values = torch.arange(30, dtype=torch.float32)
    tensors = [Stored.of("master/w", values), Stored.of("exp_avg/w", values)]
    write_tensor_file(folder / slice_file(0), tensors, metadata_of({"w": (0, 30)}, {}))
    relist(folder, slice_file(0))
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    assert check_coverage(index, manifest) == []
    (line,) = header_faults(folder, manifest, index, (0, 1))
    assert "has other slices than state/slices.safetensors says" in line
    with pytest.raises(CheckpointError, match="has other slices"):
        choose_checkpoint(str(folder), folder.parent, Ranks())


def rows() -> Iterator[tuple[str, dict[str, list[list[int]]], str]]:
    good = {"even": [], "runs": [[0, 0, 60, 0, 0]], "scalars": [[0, 0]]}
    for name, changed, says in (
        ("runs", [[1, 0, 60, 0, 0]], "parameter of runs"),
        ("runs", [[-1, 0, 60, 0, 0]], "parameter of runs"),
        ("runs", [[0, 1, 60, 0, 0]], "does not lie in its parameter"),
        ("runs", [[0, 2**62, 2**62, 0, 0]], "does not lie in its parameter"),
        ("runs", [[0, 0, 0, 0, 0]], "does not lie in its parameter"),
        ("runs", [[0, 0, 60, 1, 0]], "rank of runs"),
        ("runs", [[0, 0, 60, 0, 3]], "kind of runs"),
        ("even", [[0, 0]], "divided evenly and has other runs"),
        ("scalars", [[0, 1]], "numbers of scalars"),
        ("scalars", [[0, 0], [0, 0]], "scalars has a parameter twice"),
    ):
        yield name, good | {name: changed}, says


@pytest.mark.parametrize(("name", "content", "says"), list(rows()))
def test_a_damaged_table_is_one_error(folder, name, content, says):
    columns = {"even": 2, "runs": 5, "scalars": 2}
    tensors = [
        Stored.of(n, torch.tensor(r, dtype=torch.int64).view(-1, columns[n]))
        for n, r in content.items()
    ]
    about = {"world_size": 1, "kinds": [["exp_avg", MASTER]], "numbers": [{"step": 4}]}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    write_tensor_file(folder / TABLE, tensors, metadata)
    relist(folder, TABLE)
    with pytest.raises(CheckpointError, match=says):
        read_index(folder, read_manifest(folder))


def test_forged_headers_of_the_table_are_one_error_or_none(folder):
    kept = shutil.copytree(folder, folder.parent.parent / "kept")
    refused = 0
    for seed in range(150):
        forge_header(folder, TABLE, random.Random(seed))
        try:
            read_index(folder, read_manifest(folder))
        except CheckpointError as error:
            refused += 1
            assert len(error.problems) == 1  # noqa: PT017
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert refused > 50


def test_headers_of_many_ranks_make_the_table_that_the_ranks_would(tmp_path):
    parts = divided("joined", 5, random.Random(1))
    staging = folders.new_staging(tmp_path, 1)
    for rank, part in enumerate(parts):
        tensors = [
            Stored.of(f"{key}/{name}", torch.zeros(span[1]))
            for name, span in part.spans.items()
            for key in part.keys[name]
        ]
        about = metadata_of(part.spans, part.scalars)
        write_tensor_file(staging / slice_file(rank), tensors, about)
    manifest = Manifest(
        step=1, world_size=5, stage=1, precision="bf16", resumable=True, has_weights=False,
        created="", parameters=SHAPES, optimized=tuple(SHAPES),
    )  # fmt: skip
    made = table_of(enumerate(parts), SHAPES, 5)
    found = table_from_headers(staging, manifest)
    assert [found.of_rank(r, SHAPES) for r in range(5)] == [
        made.of_rank(r, SHAPES) for r in range(5)
    ]
