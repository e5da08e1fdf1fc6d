"""Headers, values and states that anybody may have damaged or forged."""

from __future__ import annotations

import json
import shutil
import struct
from typing import Any

import pytest
import torch

from dstrain.checkpoint import (
    choose_checkpoint,
    read_manifest,
    verify,
)
from dstrain.checkpoint.codec import decode, encode
from dstrain.checkpoint.content import RUN
from dstrain.checkpoint.weights import _places
from dstrain.core.errors import CheckpointError
from dstrain.core.ranks import Ranks
from dstrain.models import Stored, write_tensor_file
from dstrain.models.tensor_file import TensorReader
from tests.unit.checkpoint.forged import (
    ARGUMENTS,
    NUMEL,
    OWN,
    SLICES,
    STATE,
    forge,
    position,
    relist,
    resumed,
    whole,
)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"spans": '{"w": [1, 60]}', "scalars": "{}"}, "which has 60"),
        ({"spans": '{"w": [-1, 60]}', "scalars": "{}"}, "spans"),
        ({"spans": '{"w": ["0", 60]}', "scalars": "{}"}, "spans"),
        ({"spans": '{"w": [0, 59]}', "scalars": "{}"}, "its spans say 59"),
        ({"spans": '{"v": [0, 60]}', "scalars": "{}"}, "none of the checkpoint's parameters"),
        ({"spans": "{}", "scalars": "{}"}, "do not name"),
        ({"scalars": "{}"}, "has no spans in its metadata"),
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
    own = position(4).rank_state()
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
    assert choose_checkpoint("auto", folder.parent, Ranks()) is None
    with pytest.raises(CheckpointError, match="checkpoint-9: .*no manifest"):
        choose_checkpoint(True, folder.parent, Ranks())


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
