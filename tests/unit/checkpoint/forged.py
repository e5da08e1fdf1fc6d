"""A small checkpoint, and the means to damage or forge it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import (
    choose_checkpoint,
    folders,
)
from dstrain.checkpoint.codec import encode
from dstrain.checkpoint.content import BUFFERS, LAYOUT, RUN, TABLE, rank_file, slice_file
from dstrain.checkpoint.manifest import NAME, Manifest, _checksum, write_manifest
from dstrain.checkpoint.slice_table import Run, SliceTable
from dstrain.checkpoint.table_file import write_table
from dstrain.core.files import record_of, write_json
from dstrain.core.progress import Progress
from dstrain.core.ranks import Ranks
from dstrain.core.seeds import random_state
from dstrain.models import Stored, write_tensor_file
from dstrain.trainer.start import _read_start
from dstrain.training.resume import Position
from tests.unit.checkpoint.small import run_values

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
    table = SliceTable(
        1, (("exp_avg", "master"),), {}, {"w": [Run(0, NUMEL, 0, 0)]}, {"w": {"step": step}}
    )
    files[TABLE] = write_table(staging / TABLE, table, ["w"])
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
        OWN: encode(position(step).rank_state(), where="own"),
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
    chosen = choose_checkpoint(
        True,
        output_dir,
        Ranks(),
        inspect=lambda f, manifest: _read_start(f, manifest, Ranks()) and None,
    )
    assert chosen is not None
    return chosen[0].name


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
        name = draw.choice([SLICES, BUFFERS, TABLE])
        forge_header(folder, name, draw)
        return name
    name = draw.choice([*DOCUMENTS, SLICES, BUFFERS, TABLE])
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
