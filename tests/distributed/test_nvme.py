"""Optimizer and parameters offloaded to a disk: saved, resumed, exported as any other state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer, whole_weights
from tests.models import tiny_llama

STEPS, SAVED_AT = 4, 2
# Plain runs of the same steps differ from runs offloaded to disk in rounding only.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def _needs_the_op() -> None:
    """Skip where DeepSpeed's op is not built: building it takes five minutes."""
    from dstrain.engine.ops import is_built

    if not is_built("async_io"):
        pytest.skip("`python -m dstrain.engine.ops async_io` has not been run, or needs libaio-dev")


def large_llama(*, frozen: bool = False) -> torch.nn.Module:
    """Build a llama with some matrices that DeepSpeed offloads: a rank's part is over 1 MB."""
    model = tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=4096, num_hidden_layers=1)
    model.get_input_embeddings().weight.requires_grad_(not frozen)
    return model


def offloaded(folder: Path, *, parameters: bool, **more: Any) -> dict[str, Any]:
    """Return settings that offload the optimizer, and the parameters if asked, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {"device": "nvme", "nvme_path": str(folder), "pin_memory": False}
    zero: dict[str, Any] = {"offload_optimizer": {**place, "buffer_count": 12, **more}}
    if parameters:
        zero["offload_param"] = {
            **place, "buffer_count": 16, "buffer_size": 2_000_000, "max_in_cpu": 0,
        }  # fmt: skip
    return {"stage": 3, "sub_group_size": 300_000, "deepspeed": {"zero_optimization": zero}}


def trained(folder: Path, *, resume: Any = None, frozen: bool = False, **settings: Any) -> Any:
    """Train, saving after the second step; return the trainer."""
    common: dict[str, Any] = {
        "model": large_llama(frozen=frozen), "max_steps": STEPS, "evaluation": 0,
        "save_strategy": "steps", "save_steps": SAVED_AT, "stage": 3,
    }  # fmt: skip
    trainer = make_trainer(folder, **{**common, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def shards_of(trainer: Any) -> list[Any]:
    """Return the shards of this rank."""
    return list(trainer._engines.training.state.shards())


def files_of(shards: list[Any]) -> set[str]:
    """Return the names of parameters with values on the disk."""
    return {s.name for s in shards for key in s.tensor_keys() if s.is_on_disk(key)}


CASES = [
    pytest.param(False, {}, id="optimizer"),
    pytest.param(True, {}, id="both"),
    pytest.param(True, {"pipeline_read": True, "pipeline_write": True}, id="pipelined"),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("parameters", "more"), CASES)
def test_a_resumed_run_equals_one_that_never_stopped(
    parameters: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    """To the bit, in losses and in weights; from the disk also to host memory and back."""
    place = offloaded(tmp_path / "swap", parameters=parameters, **more)
    whole = trained(tmp_path / "whole", **place)
    expected, weights = losses(whole), whole_weights(whole)
    assert len(expected) == STEPS
    on_disk = files_of(shards_of(whole))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= on_disk
    whole.close()
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}")
    again = trained(tmp_path / "again", resume=checkpoint, **place)
    assert files_of(shards_of(again)) == on_disk
    assert losses(again) == expected
    for name, values in whole_weights(again).items():
        assert torch.equal(values, weights[name]), name
    again.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("parameters", [False, True], ids=["optimizer", "both"])
def test_from_the_disk_to_another_stage_and_back(parameters: bool, tmp_path: Path) -> None:
    """A run goes on in memory at stage 1, and one of stage 2 on the disk, as if never stopped."""
    place = offloaded(tmp_path / "swap", parameters=parameters)
    on_disk = trained(tmp_path / "disk", **place)
    on_disk.close()
    plain = trained(tmp_path / "plain", stage=2)
    expected = losses(plain)
    assert losses(on_disk) == pytest.approx(expected, rel=TOLERANCE)
    plain.close()
    for source, settings in (("disk", {"stage": 1}), ("plain", place)):
        checkpoint = str(tmp_path / source / f"checkpoint-{SAVED_AT}")
        again = trained(tmp_path / f"from-{source}", resume=checkpoint, **settings)
        assert losses(again) == pytest.approx(expected, rel=TOLERANCE)
        again.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("in_background", [None, True], ids=["waiting", "background"])
def test_the_best_model_of_a_run_on_the_disk(
    in_background: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen matrix is on the disk too; no more than one sub-group is read at a time."""
    from safetensors.torch import load_file

    from dstrain.engine.state.swapped import SwapFile

    counts: list[int] = []
    read = SwapFile.read

    def counted(file: SwapFile, start: int, numel: int) -> torch.Tensor:
        counts.append(numel)
        return read(file, start, numel)

    monkeypatch.setattr(SwapFile, "read", counted)
    trainer = trained(
        tmp_path / "run", frozen=True, save_async=in_background, load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=SAVED_AT, evaluation=4, greater_is_better=True,
        **offloaded(tmp_path / "swap", parameters=True),
    )  # fmt: skip
    assert max(counts) == 4096 * 256 // 2  # a rank's part of the largest matrix
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{SAVED_AT}"  # the loss falls, and "greater" is best
    shards = shards_of(trainer)
    assert {s.value_key for s in shards if s.name == "model.embed_tokens.weight"} == {"weight"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= files_of(shards)
    assert all(s.holder.numel() <= 1 for s in shards if s.is_on_disk(s.value_key))
    weights = whole_weights(trainer)
    saved = load_file(best / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, values in saved.items():
        assert torch.equal(values, weights[name]), name
    trainer.save_model(str(tmp_path / "model"))
    for name, values in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(values, weights[name]), name
    trainer.close()
    resumed = trained(tmp_path / "resumed", frozen=True, resume=str(best), stage=0)
    assert losses(resumed) == pytest.approx(losses(trainer), rel=TOLERANCE)
    resumed.close()


@pytest.mark.ranks(2, timeout=300)
def test_what_is_captured_on_the_disk_comes_back(tmp_path: Path) -> None:
    """As a run does that ran out of memory: weights and both moments, to the bit."""
    trainer = trained(tmp_path / "run", **offloaded(tmp_path / "swap", parameters=True))
    state = trainer._engines.training.state
    before, captured = whole_weights(trainer), state.capture()
    with state.loading() as shards:
        for shard in shards:
            for key in shard.tensor_keys():
                shard.write(key, shard.start, torch.zeros(shard.numel))
    assert all(not values.any() for values in whole_weights(trainer).values())
    state.restore(captured)
    for name, values in whole_weights(trainer).items():
        assert torch.equal(values, before[name]), name
    again = state.capture()
    assert again.scalars == captured.scalars
    for place, values in captured.tensors.items():
        assert torch.equal(again.tensors[place], values), place
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_two_models_have_folders_of_their_own(tmp_path: Path, rank: int) -> None:
    """A second model that is offloaded to the same path leaves the first one's weights alone.

    Both are loaded partitioned, by transformers.
    """
    import gc

    import dstrain
    from dstrain import TrainingArguments
    from dstrain.core.ranks import barrier
    from tests.distributed.runs import make_trainer as make

    settings = offloaded(tmp_path / "swap", parameters=True)
    model = large_llama()
    if rank == 0:
        model.save_pretrained(tmp_path / "saved")
    barrier()
    args = TrainingArguments(
        str(tmp_path / "run"), zero_stage="3", report_to="none", deepspeed=settings["deepspeed"]
    )
    with dstrain.partitioned(args):
        first, second = (type(model).from_pretrained(tmp_path / "saved") for _ in range(2))
    first_trainer = make(tmp_path / "run", model=first, evaluation=0, max_steps=1, **settings)
    for name, values in whole_weights(first_trainer).items():
        assert torch.equal(values, model.get_parameter(name)), name
    first_trainer.train()
    expected = whole_weights(first_trainer)
    first_trainer.close()
    del second
    gc.collect()
    for name, values in whole_weights(first_trainer).items():
        assert torch.equal(values, expected[name]), name
