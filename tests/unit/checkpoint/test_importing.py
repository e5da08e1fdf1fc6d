"""What an import refuses: pickles that would have to be executed, and what does not add up."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.checkpoint import import_checkpoint, read_run, verify
from dstrain.checkpoint.foreign.parts import match_groups
from dstrain.checkpoint.foreign.pickles import Number, Record, load_pickle
from dstrain.core.errors import CheckpointError
from tests.launch import ROOT


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_is_never_executed(tmp_path, zipped, inside):
    """Neither of today's archives nor of old torch's plain pickles, wherever it hides."""
    mark, file = tmp_path / "executed", tmp_path / "x.pt"
    evil = Evil(mark)
    content = {"module": {"w": torch.ones(3)}, "client": [evil] if inside else evil}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        load_pickle(file)
    assert not mark.exists()
    assert "posix.mkdir" in str(caught.value)
    torch.load(file, weights_only=False)  # the file is what it claims to be
    assert mark.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pickle(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_what_deepspeed_stores_is_read_without_its_classes(tmp_path):
    """Of today's DeepSpeed, whose classes are only needed to write the file."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0**9, 100, 1.0, 1, False)
    torch.save(
        [ZeroStageEnum(2), fragment_address(numel=5, start=3), scaler, LossScaler(4.0)],
        tmp_path / "x.pt",
    )
    stage, address, dynamic, fixed = load_pickle(tmp_path / "x.pt")
    assert (stage, type(stage)) == (2, Number)
    assert (address.numel, address.start, type(address)) == (5, 3, Record)
    assert (dynamic.cur_scale, fixed.cur_scale) == (512.0, 4.0)
    assert type(dynamic) is type(fixed) is Record


class Reduced:
    """Is stored as a call of ``getattr``."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        return getattr, self.args


def test_an_enumeration_as_pythons_before_3_11_4_store_it(tmp_path):
    """There a member is getattr(class, name), which must not become a way to anything else."""
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    for stage in ZeroStageEnum:
        torch.save([Reduced(ZeroStageEnum, stage.name)], tmp_path / "x.pt")
        (read,) = load_pickle(tmp_path / "x.pt")
        assert (read, type(read)) == (stage.value, Number)
    for args in [(ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (fragment_address, "start")]:
        torch.save([Reduced(*args)], tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"objects of builtins\.getattr"):
            load_pickle(tmp_path / "x.pt")


def test_pickles_are_read_in_one_place():
    """Nothing else that touches a checkpoint loads one; DeepSpeed's own layout is DeepSpeed's.

    ``core/ranks.py`` reads what the ranks of one run send each other, as torch's collectives of
    objects do; nothing of a file gets there.
    """
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in ("core", "engine", "models", "checkpoint", "trainer", "cli")
        for path in (ROOT / "dstrain" / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
        or (isinstance(node, ast.Import) and any(a.name == "pickle" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module in ("pickle", "joblib", "dill"))
    ]
    places = {place.partition(":")[0] for place in found}
    assert places == {"dstrain/checkpoint/foreign/pickles.py", "dstrain/core/ranks.py"}


def groups(*counts: int) -> list[dict[str, Any]]:
    return [{"params": list(range(count))} for count in counts]


SHAPES = {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (4, 4), "norm.weight": (4,)}


def test_numbers_of_an_optimizer_are_matched_with_names():
    assert match_groups(groups(4), SHAPES, None) == [list(SHAPES)]
    by_shape = [["a.weight", "b.weight"], ["a.bias", "norm.weight"]]
    assert match_groups(groups(2, 2), SHAPES, None) == by_shape
    decayed = ["a.weight", "b.weight", "norm.weight"]
    assert match_groups(groups(3, 1), SHAPES, decayed) == [decayed, ["a.bias"]]
    with pytest.raises(CheckpointError, match=r"groups of \[1, 3\] parameters, the model 4"):
        match_groups(groups(1, 3), SHAPES, decayed)


def test_folders_with_nothing_to_bring_in_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "run/checkpoint-9").mkdir(parents=True)
    (tmp_path / "run/checkpoint-10").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean '.*/run/checkpoint-10'\?"):
        import_checkpoint(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run/latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="no folder beside it"):
        import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "tensor or pipeline"),
        (["mp_rank_00_model_states.pt", "layer_0_expert_0_mp_rank_00_model_states.pt"], "experts"),
    ],
)
def test_kinds_that_cannot_be_taken_apart_are_refused(tmp_path, names, says):
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).touch()
    with pytest.raises(CheckpointError, match=says):
        import_checkpoint(tmp_path / "in", tmp_path / "out")


def test_the_schedule_of_transformers_with_deepspeed_stands_beside_its_files(tmp_path):
    """Its Trainer steps the schedule itself, so DeepSpeed's files have none."""
    from deepspeed.utils.tensor_fragment import fragment_address

    source = tmp_path / "checkpoint-4"
    (source / "global_step4").mkdir(parents=True)
    (source / "latest").write_text("global_step4")
    (source / "trainer_state.json").write_text('{"global_step": 4, "epoch": 0.5}')
    torch.save({"last_epoch": 4, "base_lrs": [0.1]}, source / "scheduler.pt")
    model = {
        "module": {"w": torch.zeros(2, 3)}, "buffer_names": [], "param_shapes": [{"w": (2, 3)}],
        "shared_params": {}, "lr_scheduler": None, "skipped_steps": 0, "global_steps": 4,
        "global_samples": 16, "dp_world_size": 1, "ds_config": {"bf16": {"enabled": True}},
    }  # fmt: skip
    torch.save(model, source / "global_step4/mp_rank_00_model_states.pt")
    state = {"step": torch.tensor(4.0), "exp_avg": torch.ones(6)}
    optimizer = {
        "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "single_partition_of_fp32_groups": [torch.arange(6.0)],
        "param_slice_mappings": [{"w": fragment_address(numel=6, start=0)}],
    }
    torch.save(
        {"optimizer_state_dict": optimizer, "ds_config": model["ds_config"]},
        source / "global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
    done = import_checkpoint(source, tmp_path / "out")
    assert (done.step, done.num_parameters) == (4, 1)
    run = read_run(tmp_path / "out")
    assert run["engine"]["schedule"] == {"last_epoch": 4, "base_lrs": [0.1]}
    assert run["position"]["progress"]["samples_in_epoch"] == 16
    manifest, problems = verify(tmp_path / "out")
    assert (manifest.precision, manifest.optimized, problems) == ("bf16", ("w",), [])
