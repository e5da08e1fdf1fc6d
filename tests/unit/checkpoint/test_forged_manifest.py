"""Manifests that anybody may have damaged or forged: each verifies, falls back, or is one error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint import (
    compare,
    export,
    read_manifest,
    verify,
)
from dstrain.checkpoint.codec import decode, encode
from dstrain.checkpoint.content import LAYOUT, RUN
from dstrain.checkpoint.manifest import NAME, write_manifest
from dstrain.core.documents import MOST_LEVELS, parsed
from dstrain.core.errors import CheckpointError
from tests.unit.checkpoint.forged import (
    ARGUMENTS,
    DOCUMENTS,
    OWN,
    RECORD,
    STATE,
    forge,
    relist,
    resumed,
    whole,
)


def test_the_whole_one_is_good(folder: Path, tmp_path: Path) -> None:
    assert verify(folder)[1] == []
    assert resumed(folder.parent) == "checkpoint-4"
    assert export(folder, tmp_path / "out") == 2
    assert not compare(folder, whole(tmp_path / "again"))


# --- the manifest --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", "x"), ("layout", None), ("layout", ["slices"]),
        ("stage", 4), ("stage", -1), ("stage", "2"), ("stage", True), ("step", -1), ("step", 1.0),
        ("step", 2**63), ("world_size", 0), ("world_size", "1"), ("precision", "fp64"),
        ("precision", "bf16\n"), ("resumable", 1), ("has_weights", "no"), ("created", 3),
        ("parameters", {"w": [-1, 2]}), ("parameters", {"w": "60"}), ("parameters", {"w": None}),
        ("parameters", {"w": [2**40, 2**40]}), ("parameters", []), ("optimized", ["other"]),
        ("optimized", "w"), ("metrics", 3), ("metrics", [1]),
        ("versions", {"a": 1}),
        ("files", []), ("files", {"x": 3}), ("files", {"x": {"size": 1}}),
        ("files", {"x": {"size": -1, "checksum": "xxh3:" + "0" * 16}}),
        ("files", {"x": {"size": 1, "checksum": "md5:0"}}),
        ("elsewhere", None), ("unknown", 1), ("version", True), ("version", 0), ("version", "1"),
    ],
    ids=repr,
)  # fmt: skip
def test_every_field_of_the_manifest_has_its_type_and_range(folder, field, value):
    forge(folder, NAME, lambda body: body | {field: value})
    with pytest.raises(CheckpointError, match=f"manifest.json is damaged(?s:.*){field}") as error:
        read_manifest(folder)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\0b", "..\\x", NAME,
     "\ud800"],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("where", ["files", "elsewhere"])
def test_no_listed_name_leaves_the_folder(folder, name, where):
    record = {"size": 0, "checksum": "xxh3:" + "0" * 16}
    forge(folder, NAME, lambda body: body | {where: {**body[where], name: record}})
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("inside", [False, True])
def test_a_listed_link_that_leads_outside_is_not_read(folder, tmp_path, inside):
    """Its content may be anything of the user's, even with the right checksum."""
    target = folder / "real.json" if inside else tmp_path / "elsewhere.json"
    shutil.move(folder / "config.json", target)
    (folder / "config.json").symlink_to(target)
    problems = verify(folder)[1]
    assert problems == (
        [] if inside else ["config.json leads outside of the checkpoint, by a symbolic link"]
    )


def test_a_pipe_is_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    record = {"size": 0, "checksum": "xxh3:" + "0" * 16}
    forge(folder, NAME, lambda b: b | {"files": {**b["files"], "config.json": record}})
    assert verify(folder)[1] == ["config.json is no file"]
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME)
    with pytest.raises(CheckpointError, match="it is no file"):
        read_manifest(folder)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_a_damaged_file(folder, name, opens, closes):
    """200,000 brackets once were a RecursionError on all ranks."""
    whole(folder.parent, 2)
    middle = "1" if opens == '{"a":' else ""
    (folder / name).write_text(opens * 200_000 + middle + closes * 200_000)
    if name != NAME:
        relist(folder, name)
    if name in (NAME, RUN, OWN, STATE, ARGUMENTS):
        assert resumed(folder.parent) == "checkpoint-2"
    else:
        act = {RECORD: lambda: compare(folder, folder), LAYOUT: lambda: export(folder, Path("out"))}
        with pytest.raises(CheckpointError, match="nested deeper"):
            act[name]()


def test_what_is_written_is_never_too_deep_to_be_read():
    value: Any = 1
    for _ in range(MOST_LEVELS):
        value = (value,)
    with pytest.raises(CheckpointError, match="nested too deep"):
        encode(value, where="state")
    value = 1
    for _ in range(80):
        value = (value,)
    assert decode(parsed(json.dumps({"x": [encode(value, where="")]}).encode()))["x"] == [value]


def test_metrics_are_whatever_a_users_function_gave(tmp_path):
    """Text and lists are allowed in logs, and must not make a checkpoint unreadable."""
    folder = whole(tmp_path)
    given = {"eval_loss": 1.5, "eval_each": [1, {"a": 2}], "eval_note": "x", "eval_good": True}
    manifest = dataclasses.replace(read_manifest(folder), metrics=given)
    write_manifest(folder, manifest)
    read = read_manifest(folder)
    assert read.metrics == given
    assert [read.figure(name) for name in (*given, "none")] == [1.5, None, None, None, None]
