"""Checkpoints with parameters of shape (): at other topologies, exported, compared, brought in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.forked import run_job
from tests.distributed.test_topologies import Place
from tests.models import RaggedTokens, pad_collate
from tests.scaled import HEAT, SCALARS, scaled_llama

STEPS, SAVED_AT = 6, 4
TABLE: dict[Place, list[Place]] = {
    Place(3, 3): [Place(0, 1), Place(1, 2), Place(2, 1, "optimizer"), Place(3, 2, "all")],
    Place(0, 2): [Place(3, 3), Place(2, 2), Place(0, 1)],
    Place(2, 2, "", "bf16"): [
        Place(3, 1, "", "bf16"), Place(0, 2, "", "bf16"), Place(1, 3, "", "bf16"),
    ],
    Place(1, 2, "", "fp16"): [Place(3, 3, "", "fp16"), Place(0, 1, "", "fp16")],
    Place(1, 3): [Place(0, 2)],
}  # fmt: skip
# NAdam keeps a product beside its moments: a number, which at stage 0 has the shape of a moment.
OPTIMIZERS = dict(zip(TABLE, ("adamw_torch", "nadam", "adamw_torch", "adamw_torch", "nadam")))  # noqa: B905
TOLERANCES = {"fp32": 2e-6, "bf16": 2e-4, "fp16": 2e-4}


def name_of(saved: Place, place: Place) -> str:
    """Name the folder of the run at ``place`` that goes on from the checkpoint of ``saved``."""
    number = list(TABLE).index(saved)
    return str(number) if place is saved else f"{number}-{TABLE[saved].index(place)}"


@pytest.mark.slow
def test_a_checkpoint_of_any_place_goes_on_in_any_other(tmp_path: Path) -> None:
    """Stages, numbers of ranks, offload, formats, and an optimizer with numbers in its state."""
    found = run_job("scalars", tmp_path, timeout=500)
    wrong = []
    for saved, places in TABLE.items():
        whole = found[name_of(saved, saved)]
        assert len(whole) == STEPS
        for place in places:
            again = found[name_of(saved, place)]
            if again != pytest.approx(whole, rel=TOLERANCES[saved.precision]):
                wrong.append((saved, place, whole, again))
    assert not wrong


def save(folder: Path, stage: int, **settings: Any) -> Path:
    """Train two steps with checkpoints at each; the folder of the last."""
    from tests.distributed.runs import make_trainer

    trainer = make_trainer(
        folder, stage=stage, model=scaled_llama(), max_steps=2, save_strategy="steps",
        save_steps=1, learning_rate=1e-2, **settings,
    )  # fmt: skip
    trainer.train()
    trainer.close()
    return folder / "checkpoint-2"


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_tools_take_them(stage: int, tmp_path: Path, rank: int) -> None:
    """Verify, export, diff, and DeepSpeed's own format, which its engine then loads."""
    import deepspeed
    from safetensors.torch import load_file

    from dstrain.checkpoint import compare, convert, export, verify
    from dstrain.core.ranks import barrier
    from dstrain.engine import scalars_as_bytes

    last = save(tmp_path / "ours", stage)
    if rank == 0:
        assert verify(last)[1] == []
        export(last, tmp_path / "exported")
        convert(last, tmp_path / "theirs")
        assert not compare(last, last)
        other = compare(tmp_path / "ours/checkpoint-1", last)
        assert {d.name for d in other.tensors} >= {"scale", "shift"}
        assert "heat" not in {d.name for d in other.tensors}
    barrier()
    exported = load_file(tmp_path / "exported/model.safetensors")
    stored = load_file(last / "model.safetensors")
    assert set(exported) == set(stored)
    for name, weights in stored.items():
        assert (exported[name].shape, exported[name].dtype) == (weights.shape, weights.dtype), name
        assert torch.equal(exported[name], weights), name
    assert [exported[name].shape for name in SCALARS] == [()] * 3
    assert exported["heat"].item() == HEAT
    for other in (1, 3):
        made = scaled_llama()
        trained = [p for p in made.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": other},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "checkpoint": {"load_universal": True},
        }
        with scalars_as_bytes():
            engine, *_ = deepspeed.initialize(model=made, model_parameters=trained, config=config)
        engine.load_checkpoint(str(tmp_path / "theirs"))
        from dstrain.engine import gathered

        with gathered(made.parameters()):
            assert made.scale.shape == ()
            assert torch.equal(made.scale.detach(), stored["scale"])
        engine.destroy()


@pytest.mark.ranks(2, timeout=240)
def test_deepspeeds_own_layout(tmp_path: Path) -> None:
    """``checkpoint_format="deepspeed"``: saved, resumed, and brought in as slices."""
    from dstrain.checkpoint import import_checkpoint, verify
    from dstrain.core.ranks import barrier, launched_ranks
    from tests.distributed.runs import losses, make_trainer

    def made() -> Any:
        model = scaled_llama()
        model.heat.requires_grad_(True)  # stage 0 has no names of what is trained
        return model

    for stage in (0, 2, 3):
        folder = tmp_path / str(stage)
        settings = {
            "stage": stage, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
            "learning_rate": 1e-2,
        }  # fmt: skip
        whole = make_trainer(
            folder / "whole", model=made(), checkpoint_format="deepspeed", **settings
        )
        whole.train()
        whole.close()
        start = folder / "whole/checkpoint-2"
        again = make_trainer(
            folder / "again", model=made(), checkpoint_format="deepspeed", **settings
        )
        again.train(str(start))
        assert losses(again) == losses(whole)
        again.close()
        if launched_ranks().is_main:
            import_checkpoint(start, folder / "slices")
            assert verify(folder / "slices")[1] == []
        barrier()
        other = make_trainer(folder / "other", model=made(), **settings | {"stage": 3 - stage // 2})
        other.train(str(folder / "slices"))
        assert losses(other) == pytest.approx(losses(whole), rel=3e-6)
        other.close()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.NAdam])
def test_a_run_of_transformers_comes_in(cls: Any, tmp_path: Path) -> None:
    """Without DeepSpeed; of CLIP, whose ``logit_scale`` has the shape ()."""
    import transformers
    from safetensors.torch import load_file

    from dstrain.checkpoint import import_checkpoint, read_run, verify
    from dstrain.checkpoint.manifest import read_manifest
    from dstrain.checkpoint.slice_index import read_index
    from tests.families.zoo import FAMILIES

    family = FAMILIES["clip"]
    model: Any = family.build()
    assert isinstance(model, transformers.CLIPModel)
    optimizer = cls(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(**family.collate(family.samples(4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs, ours = tmp_path / "checkpoint-2", tmp_path / "ours"
    model.save_pretrained(theirs)
    torch.save(optimizer.state_dict(), theirs / "optimizer.pt")
    (theirs / "trainer_state.json").write_text(json.dumps({"global_step": 2, "epoch": 1.0}))
    import_checkpoint(theirs, ours)
    assert verify(ours)[1] == []
    index = read_index(ours, read_manifest(ours))
    assert set(index.keys_of("logit_scale")) == {"master", "exp_avg", "exp_avg_sq"}
    numbers = index.scalars["logit_scale"]
    assert set(numbers) == {"step"} | ({"mu_product"} if cls is torch.optim.NAdam else set())
    held = load_file(ours / "state/rank-00000.safetensors")
    state = optimizer.state[model.logit_scale]
    assert held["exp_avg/logit_scale"].item() == state["exp_avg"].item()
    assert read_run(ours)["engine"]["counters"]["global_steps"] == 2


def test_a_shard_of_shape_nothing_tells_moments_from_numbers() -> None:
    """At stage 0 the holder itself has the shape (); the other parameters tell."""
    from dstrain.engine import read_scalars
    from dstrain.engine.state import locate_shards

    model = scaled_llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.NAdam(trained, lr=1e-2)
    model(**pad_collate(RaggedTokens(2).examples)).loss.backward()
    optimizer.step()
    held = locate_shards(model, optimizer)
    keys = {shard.name: shard.tensor_keys() for shard in held}
    assert keys["scale"] == keys["lm_head.weight"] == ["master", "exp_avg", "exp_avg_sq"]
    assert keys["heat"] == ["weight"]
    numbers = read_scalars(held)
    assert numbers["scale"] == numbers["lm_head.weight"]
    assert set(numbers["scale"]) == {"step", "mu_product"}
