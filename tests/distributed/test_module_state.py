"""What modules hold beside weights, each rank's own, and what they do themselves on loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import run_job
from tests.module_state import (
    KINDS,
    Doubles,
    Hears,
    LoadsParts,
    LoadsWhole,
    NotItsOwn,
    Outgrows,
    Renames,
    Sheds,
    Tells,
    Wipes,
    run_of,
    trainer_of,
)

LAYOUTS = ["dstrain", "deepspeed"]


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", [Hears, Sheds, Outgrows])
def test_a_resumed_run_is_the_run_that_never_stopped(
    kind: Any, stage: int, layout: str, tmp_path: Path
) -> None:
    """Extra state of each rank's own; a buffer that is gone; one that has another shape."""
    settings = {"save_steps": 4, "checkpoint_format": layout}
    straight = run_of(tmp_path, kind(), stage, **settings)
    again = run_of(tmp_path, kind(), stage, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert again.losses == straight.losses
    assert again.state == straight.state


@pytest.mark.ranks(2, timeout=240)
def test_state_is_stored_for_a_rank_only_where_it_is_its_own(tmp_path: Path) -> None:
    """Else the main rank's is there once."""
    for kind, differs in ((Hears, True), (Tells, False)):
        folder = tmp_path / kind.__name__
        run_of(folder, kind(), 2, save_steps=4)
        state = folder / "checkpoint-4/state"
        assert "extra_states" in json.loads((state / "run.json").read_text())
        own = [json.loads((state / f"rank-{k:05d}.json").read_text()) for k in (0, 1)]
        assert "extra_states" not in own[0]
        assert ("extra_states" in own[1]) is differs


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("only_model", [False, True])
@pytest.mark.parametrize("kind", [Hears, Sheds, Outgrows])
def test_the_best_model_comes_with_its_state(kind: Any, only_model: bool, tmp_path: Path) -> None:
    """Of step 2, when the buffer was still there and as it was built."""
    if only_model and kind is Hears:
        pytest.skip("a model alone has no place for it, which is said: see test_saved_models")
    for best, greater in ((2, True), (6, False)):
        trainer = trainer_of(
            tmp_path / str(best), kind(), 2, save_steps=2, eval_strategy="steps", eval_steps=2,
            metric_for_best_model="step", greater_is_better=not greater,
            load_best_model_at_end=True, save_only_model=only_model,
            compute_metrics=True,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.best_global_step == best
        assert trainer.model.told() == trainer.seen[best]
        trainer.close()


@pytest.mark.slow
def test_another_number_of_ranks_gets_the_main_ranks_state(tmp_path: Path) -> None:
    """From two ranks to one."""
    found = run_job("module_state", tmp_path, timeout=240)
    for kind in KINDS:
        saved, begun = found[kind]
        assert begun == saved[0], kind
    assert found["Hears"][0][0] != found["Hears"][0][1]


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", [LoadsParts, LoadsWhole])
def test_what_a_module_does_on_loading_is_done(kind: Any, stage: int, tmp_path: Path) -> None:
    """On a resume and when the best model is loaded; the result is that of torch alone."""
    from safetensors.torch import load_file

    def by_torch(folder: Path) -> list[float]:
        twin = kind()
        twin.load_state_dict(load_file(folder / "model.safetensors"))
        return twin.sums

    straight = trainer_of(tmp_path, kind(), stage, save_steps=2, max_steps=2)
    straight.train()
    straight.close()
    again = trainer_of(
        tmp_path / "again", kind(), stage, save_steps=1, max_steps=4, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="step",
        greater_is_better=False, compute_metrics=True,
    )  # fmt: skip
    again.train(str(tmp_path / "checkpoint-2"))
    assert again.state.best_global_step == 3
    assert again.seen["began"] == pytest.approx(by_torch(tmp_path / "checkpoint-2"), rel=1e-6)
    best = by_torch(tmp_path / "again/checkpoint-3")
    assert again.model.sums == pytest.approx(best, rel=1e-6)
    assert best != pytest.approx(again.seen["began"], rel=1e-6)
    again.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_loading_code_changes_are_left(
    stage: int, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The run went on with the weights as they were saved, and so does a resumed one."""
    straight = run_of(tmp_path, Wipes(), stage, save_steps=4)
    again = run_of(tmp_path, Wipes(), stage, resume=str(tmp_path / "checkpoint-4"))
    assert again.losses == straight.losses
    said = [r.message for r in caplog.records if "loading code of the model changes" in r.message]
    assert len(said) == (rank == 0)
    assert all("2 weights (head.bias, head.weight)" in line for line in said)


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_under_other_names_in_the_state_dict_come_back(stage: int, tmp_path: Path) -> None:
    """Whatever hooks make of the names."""
    straight = run_of(tmp_path, Renames(), stage, save_steps=4)
    again = run_of(tmp_path, Renames(), stage, resume=str(tmp_path / "checkpoint-4"))
    assert again.losses == straight.losses
    assert again.state == straight.state


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 3])
def test_saved_models_have_the_extra_state_that_is_a_tensor_and_name_the_rest(
    stage: int, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """By ``save_model``, in checkpoints of the model alone, and by an export."""
    from safetensors.torch import load_file

    from dstrain.checkpoint import export
    from dstrain.core.ranks import barrier

    for kind in (Hears, Tells):
        is_tensor, folder = kind is Tells, tmp_path / kind.__name__
        for only_model in (False, True):
            caplog.clear()
            trainer = trainer_of(
                folder, kind(), stage, save_steps=2, max_steps=4, save_only_model=only_model,
                save_weights_with_checkpoint=only_model,
            )  # fmt: skip
            trainer.train()
            if not only_model:
                trainer.save_model(str(folder / "saved"))
            trainer.close()
            saved = folder / ("checkpoint-4" if only_model else "saved")
            assert ("_extra_state" in load_file(saved / "model.safetensors")) is is_tensor
            if rank == 0 and not only_model:
                export(folder / "checkpoint-4", folder / "exported")
                exported = load_file(folder / "exported/model.safetensors")
                assert exported.get("_extra_state") == (4 if is_tensor else None)
                assert kind().load_state_dict(exported, strict=False).unexpected_keys == []
            said = [r for r in caplog.records if "are no tensors (_extra_state)" in r.message]
            assert len(said) == (0 if is_tensor or rank else 1 if only_model else 2)
            barrier()


@pytest.mark.ranks(2, timeout=240)
def test_weights_that_hooks_save_in_another_form_are_refused_where_they_would_be_lost(
    tmp_path: Path,
) -> None:
    """A best model that would have to come back from such files; a share of a weight at stage 3."""
    from safetensors.torch import load_file

    from dstrain.core.errors import ConfigError, ModelError

    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(ConfigError, match=r"head\.weight"):
        trainer_of(tmp_path, Doubles(), 2, save_steps=2, save_only_model=True, **best)
    trainer = trainer_of(tmp_path, Doubles(), 2, save_steps=2, **best)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    twin = Doubles()
    twin.load_state_dict(load_file(tmp_path / "saved/model.safetensors"))
    assert twin.head.weight.tolist() == trainer.model.head.weight.tolist()
    trainer.close()
    parts = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    trainer = trainer_of(
        tmp_path / "three", Doubles(), 3, save_strategy="no", max_steps=1, deepspeed=parts
    )
    trainer.train()
    with pytest.raises(ModelError, match=r"head\.weight"):
        trainer.save_model(str(tmp_path / "three"))
    assert not (tmp_path / "three/model.safetensors").exists()
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_weights_that_hooks_compute_with_are_refused_before_they_are_in_parts(
    tmp_path: Path,
) -> None:
    """At stage 3, where a checkpoint would fail; not where nothing of it is saved or in parts."""
    from dstrain.core.errors import ModelError

    parts = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    saves = {"save_steps": 2, "max_steps": 2}
    with pytest.raises(ModelError, match=r"head\.weight"):
        trainer_of(tmp_path, Doubles(), 3, deepspeed=parts, **saves)
    run_of(
        tmp_path / "slices", Doubles(), 3, deepspeed=parts, save_weights_with_checkpoint=False,
        **saves,
    )  # fmt: skip
    assert (tmp_path / "slices/checkpoint-2").is_dir()
    run_of(tmp_path / "whole", Doubles(), 3, **saves)
    assert (tmp_path / "whole/checkpoint-2/model.safetensors").exists()
    run_of(tmp_path / "other", Tells(), 3, deepspeed=parts, **saves)


@pytest.mark.ranks(2, timeout=240)
def test_states_are_sent_as_files_have_them(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor itself would be unpickled on the main rank's device."""
    import torch

    from dstrain.checkpoint import extra_state

    sent: list[Any] = []

    def broadcast(value: Any) -> Any:
        sent.append(json.loads(json.dumps(value)))
        return send(value)

    send = extra_state.broadcast_object
    monkeypatch.setattr(extra_state, "broadcast_object", broadcast)
    states = {"a": torch.full((2,), float(rank)), "b": {0: torch.ones(1)}, "c": (1, rank)}
    main, own = extra_state.rank_states(states)
    assert len(sent) == 1
    assert main["a"].tolist() == [0.0, 0.0]
    assert main["b"][0].tolist() == [1.0]
    assert main["c"] == (1, 0)
    assert sorted(own) == (["a", "c"] if rank else [])
    if rank:
        assert own["a"] is states["a"]


@pytest.mark.ranks(2, timeout=240)
def test_loading_code_of_libraries_is_not_called(tmp_path: Path) -> None:
    """That of the user is, also in a ``functools.partial``."""
    run_of(tmp_path, NotItsOwn(), 2, save_steps=4)
    model = NotItsOwn()
    run_of(tmp_path, model, 2, resume=str(tmp_path / "checkpoint-4"))
    assert model.called == ["partial before", "partial after"]


@pytest.mark.ranks(2, timeout=240)
def test_loading_code_where_discarded_changes_are_looked_for(tmp_path: Path) -> None:
    """What loading writes into weights in place are their own values."""
    parts = {"stage": 3, "stage3_param_persistence_threshold": 0, "enable_sanity_checks": True}
    settings = {"deepspeed": {"zero_optimization": parts}, "save_steps": 4}
    straight = run_of(tmp_path, LoadsParts(), 3, **settings)
    again = run_of(tmp_path, LoadsParts(), 3, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert again.losses == straight.losses


@pytest.mark.ranks(2, timeout=240)
def test_weights_that_do_not_fit_whole_are_not_gathered_for_loading_code(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank has no memory left; the error is the same on both, and names the code."""
    from dstrain.checkpoint import loading_code
    from dstrain.core.errors import CheckpointError

    run_of(tmp_path, Wipes(), 3, save_steps=4)
    monkeypatch.setattr(loading_code, "free_memory_bytes", lambda _: 10 if rank else 10**9)
    with pytest.raises(CheckpointError, match=r"the hook Wipes.*wipe of the module head needs"):
        run_of(tmp_path, Wipes(), 3, resume=str(tmp_path / "checkpoint-4"))
    run_of(tmp_path, Wipes(), 2, resume=str(tmp_path / "checkpoint-4"))
