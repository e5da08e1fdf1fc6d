"""What anybody may have damaged or forged: each case verifies, falls back, or is one error."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.checkpoint import (
    bring_in,
    choose,
    compare,
    convert,
    export,
    folders,
    read_manifest,
    verify,
)
from dstrain.checkpoint.codec import decode, encode
from dstrain.checkpoint.content import BUFFERS, LAYOUT, RUN, rank_file, slice_file
from dstrain.checkpoint.manifest import NAME, Manifest, _checksum, write_manifest
from dstrain.checkpoint.native import Reader, check_readable, unpickling
from dstrain.checkpoint.weights import _places
from dstrain.core.documents import MOST_LEVELS, parsed
from dstrain.core.errors import CheckpointError
from dstrain.core.files import record_of, write_json
from dstrain.core.progress import Progress
from dstrain.core.ranks import Ranks
from dstrain.core.seeds import random_state
from dstrain.models import Stored, write_tensor_file
from dstrain.models.tensor_file import TensorReader
from dstrain.trainer.position import Position
from dstrain.trainer.saving import _read_start
from tests.unit.test_checkpoint_files import run_values

NUMEL = 60
SLICES = slice_file(0)
OWN = rank_file(0)
STATE = "trainer_state.json"
ARGUMENTS = "training_arguments.json"
RECORD = "resolved_config.json"
DOCUMENTS = (NAME, RUN, OWN, STATE, ARGUMENTS, RECORD, LAYOUT)
FUZZ_CASES = 600


def position(step: int) -> Position:
    meter = {"loss": 1.5, "finite": 1.0, "bad": -1.0, "steps": 1, "tokens": 8, "seconds": 0.5}
    return Position(
        Progress(step, 0, step, 4 * step, 8), False, True, 1.0, 0.1, 0, 3.5, 4 * step, [meter],
        random_ahead=random_state(), source={"kind": "own", "of": "x", "state": {"at": (1, 2)}},
        shares=1,
    )  # fmt: skip


def whole(output_dir: Path, step: int = 4) -> Path:
    """Make a checkpoint of one rank with every document that a run writes."""
    staging = folders.new_staging(output_dir, step)
    values = torch.arange(NUMEL, dtype=torch.float32)
    tensors = [Stored.of("master/w", values), Stored.of("exp_avg/w", -values)]
    metadata = {
        "spans": json.dumps({"w": [0, NUMEL]}),
        "scalars": json.dumps({"w": {"step": step}}),
    }
    files = {SLICES: write_tensor_file(staging / SLICES, tensors, metadata)}
    files[BUFFERS] = write_tensor_file(staging / BUFFERS, [Stored.of("seen", torch.ones(3))])
    groups = [{"lr": 0.1, "betas": (0.9, 0.95)}]
    engine = {
        "groups": groups, "rates": [0.1], "buffers": {"state": ["seen"], "varying": []},
        "schedule": {"last_epoch": step, "_last_lr": [0.1]},
        "begun": {"groups": groups, "schedule": {"last_epoch": 0, "_last_lr": [0.1]}},
    }  # fmt: skip
    run = run_values(step, **engine) | {"position": position(step).shared(), "formats": {}}
    documents = {
        RUN: encode(run, where="run"),
        OWN: encode(position(step).own(), where="own"),
        STATE: {
            "global_step": step, "epoch": 0.5, "log_history": [{"loss": 2.0, "step": 1}],
            "best_metric": 1.0, "best_global_step": step, "best_model_checkpoint": "x/checkpoint-2",
            "stateful_callbacks": {"Own": {"args": {"a": 1}, "attributes": {"b": 2}}},
        },
        ARGUMENTS: {"metric_for_best_model": "loss", "greater_is_better": False},
        RECORD: {
            "deepspeed": {"a": 1}, "provenance": {"a": {"detail": "given"}}, "arguments": {"x": 1},
            "set_arguments": ["x"], "facts": {"world_size": 1}, "versions": {"torch": "2"},
        },
        LAYOUT: [],
        "config.json": {"model_type": "none"},
    }  # fmt: skip
    for name, document in documents.items():
        files[name] = write_json(staging / name, document)
    manifest = Manifest(
        step=step, world_size=1, stage=2, precision="bf16", resumable=True, has_weights=False,
        created="2026-01-01T00:00:00+00:00", parameters={"w": (6, 10)}, optimized=("w",),
        metrics={"eval_loss": 1.0}, versions={"torch": "2"}, files=files,
    )  # fmt: skip
    write_manifest(staging, manifest)
    return folders.commit(staging, output_dir, step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole(tmp_path / "run")


def forge(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a document and make every checksum right again."""
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))
    if name == NAME:
        seal(folder)
    else:
        relist(folder, name)


def seal(folder: Path) -> None:
    body = json.loads((folder / NAME).read_bytes())
    if isinstance(body, dict):
        body.pop("checksum", None)
        body["checksum"] = _checksum(body)
    (folder / NAME).write_text(json.dumps(body))


def relist(folder: Path, name: str) -> None:
    """Have the manifest say of a file what it is now."""
    body = json.loads((folder / NAME).read_bytes())
    body["files"][name] = dataclasses.asdict(record_of(folder / name))
    (folder / NAME).write_text(json.dumps(body))
    seal(folder)


def resumed(output_dir: Path) -> str:
    """Find the checkpoint that a run would go on from."""
    chosen = choose(
        True,
        output_dir,
        Ranks(),
        look=lambda f, manifest: _read_start(f, manifest, Ranks()) and None,
    )
    assert chosen is not None
    return chosen[0].name


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


# --- pickles -------------------------------------------------------------------------------------


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def with_pickle(folder: Path, marker: Path, layout: str, tag: str = "global_step4") -> None:
    (folder / tag).mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / tag / name).write_bytes(pickle.dumps(Planted(marker)))
        relist(folder, f"{tag}/{name}")
    forge(folder, NAME, lambda body: body | {"layout": layout})


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
        bring_in(folder, tmp_path / "out")
    path = folder / "global_step4/mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        bring_in(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_leave_to_unpickle_is_made_in_one_place():
    """The loader takes nothing else, so no comparison of texts can be fallen through."""
    root = Path(folders.__file__).parents[1]
    makers = [p for p in root.rglob("*.py") if "Unpickling(" in p.read_text()]
    callers = [p for p in root.rglob("*.py") if "load_native(" in p.read_text()]
    assert [p.relative_to(root).as_posix() for p in makers] == ["checkpoint/native.py"]
    assert sorted(p.relative_to(root).as_posix() for p in callers) == [
        "checkpoint/load.py", "engine/native.py",
    ]  # fmt: skip


# --- headers, forms, states ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"spans": '{"w": [1, 60]}', "scalars": "{}"}, "which has 60"),
        ({"spans": '{"w": [-1, 60]}', "scalars": "{}"}, "spans"),
        ({"spans": '{"w": ["0", 60]}', "scalars": "{}"}, "spans"),
        ({"spans": '{"w": [0, 59]}', "scalars": "{}"}, "its spans say 59"),
        ({"spans": '{"v": [0, 60]}', "scalars": "{}"}, "none of the checkpoint's parameters"),
        ({"spans": "{}", "scalars": "{}"}, "do not name"),
        ({"scalars": "{}"}, "does not say its spans"),
        ({"spans": "[" * 300_000, "scalars": "{}"}, "nested deeper"),
        ({"spans": '{"w": [0, 60]}', "scalars": '{"w": {"step": "4"}}'}, "scalars"),
        ({"spans": '{"w": [0, 60]}', "scalars": '{"w": {"step": 1' + "0" * 30 + "}}"}, "scalars"),
        ({"spans": '{"w": [0, 60]}', "scalars": '{"w": [4]}'}, "scalars"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spans_and_scalars_fit_the_parameters(folder, metadata, says):
    values = torch.zeros(NUMEL)
    tensors = [Stored.of("master/w", values), Stored.of("exp_avg/w", values)]
    write_tensor_file(folder / SLICES, tensors, metadata)
    relist(folder, SLICES)
    (problem,) = verify(folder)[1]
    assert SLICES in problem
    assert says in problem


@pytest.mark.parametrize(
    "entry",
    [
        None, 3, [], {}, {"dtype": "F32"}, {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": None},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_header_that_cannot_be_is_a_value_error(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(ValueError, match=r"\w"), TensorReader(tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    "form",
    [
        {"__float__": "1e5"}, {"__float__": 1}, {"__tuple__": 3}, {"__tuple__": {"a": 1}},
        {"__bytes__": "***"}, {"__bytes__": 3}, {"__dict__": [[1]]}, {"__dict__": {"a": 1}},
        {"__dict__": [[{"a": 1}, 2]]}, {"__dict__": [[[{}], 2]]}, {"__counter__": [["a", "b"]]},
        {"__tensor__": None}, {"__tensor__": {"dtype": "load", "shape": [1], "data": ""}},
        {"__tensor__": {"dtype": "float32", "shape": [2], "data": "AAAA"}},
        {"__tensor__": {"dtype": "float32", "shape": [-1], "data": "AAAAAA=="}},
        {"__tensor__": {"dtype": "float32", "shape": [2**62, 2], "data": ""}},
        {"__tensor__": {"dtype": "float32", "shape": [0, 2**62, 4], "data": ""}},
        {"__tensor__": {"dtype": "float32", "shape": [1], "data": "AAAAAA==", "more": 1}},
    ],
    ids=repr,
)  # fmt: skip
def test_a_form_that_encode_does_not_write_names_its_place(folder, form):
    with pytest.raises(ValueError, match=r"a\.b\[1\] is no __"):
        decode({"a": {"b": [0, form]}})
    older = whole(folder.parent, 2)
    forge(folder, OWN, lambda own: own | {"random": form})
    assert resumed(folder.parent) == older.name


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("python"),
        lambda s: s.update(python=(3, (1, 2), None)),
        lambda s: s.update(python=(3, s["python"][1], "x")),
        lambda s: s.update(numpy=("MT19937", s["numpy"][1], 10**6, 0, 0.0)),
        lambda s: s.update(numpy=("MT19937", s["numpy"][1][:5], 3, 0, 0.0)),
        lambda s: s.update(torch=s["torch"][:100]),
        lambda s: s.update(torch="x"),
    ],
)
def test_a_random_state_is_tried_before_it_is_used(folder, change):
    """numpy takes any position, and would read other memory."""
    older = whole(folder.parent, 2)
    own = position(4).own()
    change(own["random"])
    forge(folder, OWN, lambda _: encode(own, where="own"))
    assert resumed(folder.parent) == older.name


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        (RUN, ("engine", "counters", "global_steps"), -1),
        (RUN, ("engine", "counters"), {"__class__": 1}),
        (RUN, ("engine", "groups", 0, "params"), []),
        (RUN, ("engine", "groups", 0, "lr"), {"a": 1}),
        (RUN, ("engine", "loss_scale"), {"cur_scale": 0}),
        (RUN, ("engine", "buffers"), ["seen"]),
        (RUN, ("formats",), {"w": "load"}),
        (RUN, ("global_batch_size",), 0),
        (RUN, ("position",), None),
        (RUN, ("position", "progress", "epoch"), "1"),
        (RUN, ("position", "progress", "samples_in_epoch"), -4),
        (RUN, ("position", "meters"), []),
        (RUN, ("position", "meters", 0, "bad"), "x"),
        (RUN, ("position", "due"), {"event": "on_log"}),
        (STATE, ("log_history",), {"a": 1}),
        (STATE, ("global_step",), "4"),
        (STATE, ("total_flos",), float("nan")),
        (STATE, ("total_flos",), float("inf")),
        (STATE, ("epoch",), -1.0),
        (STATE, ("num_input_tokens_seen",), True),
        (STATE, ("best_model_checkpoint",), 5),
        (STATE, ("stateful_callbacks",), [1]),
        (ARGUMENTS, ("greater_is_better",), "no"),
    ],
    ids=str,
)  # fmt: skip
def test_a_document_of_other_types_is_skipped_with_its_field(folder, name, place, value, caplog):
    def change(document: Any) -> Any:
        inner = document
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = value
        return document

    older = whole(folder.parent, 2)
    forge(folder, name, change)
    assert resumed(folder.parent) == older.name
    skipped = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert len(skipped) == 1
    assert str(place[-1]) in skipped[0]


def test_what_has_no_manifest_is_skipped_with_its_reason(folder, caplog):
    (folder.parent / "checkpoint-9").mkdir()
    assert resumed(folder.parent) == "checkpoint-4"
    assert "checkpoint-9 is skipped" in caplog.text
    assert "it has no manifest.json" in caplog.text
    shutil.rmtree(folder)
    assert choose("auto", folder.parent, Ranks()) is None
    with pytest.raises(CheckpointError, match="checkpoint-9: .*no manifest"):
        choose(True, folder.parent, Ranks())


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": {"w": "../outside.safetensors"}}, {"weight_map": {"w": "/etc/passwd"}},
        {"weight_map": {"w": "not-listed.safetensors"}}, {"weight_map": ["w"]},
        {"weight_map": None}, {}, [],
    ],
    ids=repr,
)  # fmt: skip
def test_an_index_of_weights_names_files_of_the_checkpoint_alone(folder, content):
    """The best model is loaded by it where there are no slices."""
    index = "model.safetensors.index.json"
    (folder / index).write_text(json.dumps(content))
    relist(folder, index)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        _places(folder, read_manifest(folder))


# --- fuzz ----------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**300, 0.5, -0.0, 1e308, 5e-324,
        "", "3", "x" * 5000, "../../outside", "/etc/passwd", "a\0b", "..\\up", "\ud800", "nan",
        [], {}, [[]], {"": {}}, [None] * 9, {"__class__": "x"}, {"__tuple__": 1},
    )),
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: deep(100),
    lambda: deep(260),
    lambda: {"__tensor__": {"dtype": "int64", "shape": [2**40], "data": ""}},
    lambda: {"__tensor__": {"dtype": "float32", "shape": [0], "data": ""}},
    lambda: {"__dict__": [[[1], 2]]},
    lambda: {"__counter__": [[1, 10**40]]},
    lambda: {"__bytes__": "AAAA"},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:3]) if isinstance(value, list) else items
    for key, part in items:
        yield from places(part, (*at, key))


def mutated(document: Any, draw: random.Random) -> Any:
    """Replace, remove or add values at one or two places."""
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.choice(list(places(document)))
        value = draw.choice(HOSTILE)()
        if not at:
            if draw.random() < 0.9:
                continue
            return value
        inner = document
        for part in at[:-1]:
            inner = inner[part]
        kind = draw.random()
        if kind < 0.15 and isinstance(inner, dict):
            del inner[at[-1]]
        elif kind < 0.3 and isinstance(inner, dict):
            inner[draw.choice(["", "x", "__class__", "../x", "params"])] = value
        else:
            inner[at[-1]] = value
    return document


def forge_header(folder: Path, name: str, draw: random.Random) -> None:
    """Change the header of a file of tensors, or its metadata, with right checksums."""
    content = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__")
    if metadata and draw.random() < 0.4:
        key = draw.choice(list(metadata))
        metadata[key] = json.dumps(mutated(json.loads(metadata[key]), draw))
    else:
        header = mutated(header, draw)
    text = json.dumps(header).encode()
    size = length if draw.random() < 0.1 else len(text)
    (folder / name).write_bytes(struct.pack("<Q", size) + text + content[8 + length :])
    relist(folder, name)


def spoil(folder: Path, draw: random.Random) -> str:
    """Damage or forge one thing of a checkpoint, mostly with right checksums."""
    kind = draw.random()
    if kind < 0.65:
        name = draw.choice(DOCUMENTS)
        forge(folder, name, lambda document: mutated(document, draw))
        return name
    if kind < 0.9:
        name = draw.choice([SLICES, BUFFERS])
        forge_header(folder, name, draw)
        return name
    name = draw.choice([*DOCUMENTS, SLICES, BUFFERS])
    content = bytearray((folder / name).read_bytes())
    if draw.random() < 0.5:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)
    if name != NAME and draw.random() < 0.7:
        relist(folder, name)
    return name


def names_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("seed", range(6))
def test_a_seeded_fuzz_verifies_falls_back_or_gives_one_error(tmp_path, seed):
    """Nothing is executed, hangs, or is written outside; 600 cases in all."""
    run, out = tmp_path / "run", tmp_path / "out"
    older, folder = whole(run, 2), whole(run, 4)
    kept = shutil.copytree(folder, tmp_path / "kept")
    marker = tmp_path / "marker"
    good = 0
    for case in range(FUZZ_CASES // 6):
        draw = random.Random(seed * 10_000 + case)
        if draw.random() < 0.1:
            with_pickle(folder, marker, draw.choice(["deepspeed", "slices", "x"]))
        name = spoil(folder, draw)
        before, start = names_in(tmp_path), time.monotonic()
        told = f"seed {seed}, case {case}: {name}"
        try:
            chosen = resumed(run)
        except Exception as error:
            raise AssertionError(told) from error
        assert chosen in (older.name, folder.name), told
        good += chosen == folder.name
        for act in (
            lambda: export(folder, out),
            lambda: convert(folder, out),
            lambda: compare(older, folder) and None,
        ):
            try:
                act()
            except CheckpointError as error:
                assert len(error.problems) == 1, told  # noqa: PT017
                assert not out.exists(), told
            except Exception as error:
                raise AssertionError(told) from error
            shutil.rmtree(out, ignore_errors=True)
        assert time.monotonic() - start < 10, told
        assert not marker.exists(), told
        assert names_in(tmp_path) == before, told
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert 0 < good < FUZZ_CASES // 6


def test_the_fuzz_can_tell(folder):
    """What is put back is whole: failures above are of what was spoilt."""
    before = copy.deepcopy(json.loads((folder / NAME).read_bytes()))
    seal(folder)
    assert json.loads((folder / NAME).read_bytes()) == before


def test_a_folder_that_is_not_there_is_no_save_that_did_not_finish(tmp_path):
    """A name that was typed wrongly."""
    with pytest.raises(CheckpointError, match="there is no such folder") as caught:
        read_manifest(tmp_path / "checkpoint-7")
    assert "did not finish" not in str(caught.value)
