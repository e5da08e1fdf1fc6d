"""Several Trainers in one process: on one model, one after another, and on two models at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights
from tests.models import RaggedTokens, tiny_llama

# Of the runs one after another: what the second does depends on the weights alone.
_SECOND: dict[str, Any] = {"max_steps": 3, "learning_rate": 5e-3}


def _second_alone(folder: Path, weights: dict[str, torch.Tensor], stage: int) -> Any:
    """Train the second run as if there had been no first, from a copy of the weights."""
    model = tiny_llama()
    model.load_state_dict(weights)
    trainer = make_trainer(folder, model=model, stage=stage, **_SECOND)
    trainer.train()
    return trainer


def _break_off(how: str) -> Any:
    """Return a callback that ends a training in the middle."""
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and how == "error":
                raise ZeroDivisionError
            if state.global_step == 1 and how == "interrupt":
                raise KeyboardInterrupt

    return Break


class _Forward(torch.nn.Module):
    """Raises in the middle of a forward or backward pass, when told to."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.breaks = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.breaks == "forward":
            raise ZeroDivisionError
        out = self.inner(*args, **kwargs)
        if self.breaks == "backward":
            out.register_hook(_raise)
        return out


def _raise(gradient: torch.Tensor) -> None:
    raise ZeroDivisionError


@pytest.mark.ranks(2)
@pytest.mark.parametrize("first", ["alive", "deleted", "evaluated", "error", "interrupt"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_trainer_trains_the_same_model(stage: int, first: str, tmp_path: Path) -> None:
    """As a run from the same weights in which there was no first; then the first goes on."""
    model = tiny_llama()
    breaks = first in ("error", "interrupt")
    callbacks = [_break_off(first)] if breaks else None
    one = make_trainer(tmp_path / "one", model=model, stage=stage, max_steps=2, callbacks=callbacks)
    if first == "evaluated":
        one.evaluate()
    elif breaks:
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            one.train()
    else:
        one.train()
    weights = whole_weights(one)
    if first == "deleted":
        del one
        gc.collect()

    two = make_trainer(tmp_path / "two", model=model, stage=stage, **_SECOND)
    before = two.evaluate()["eval_loss"]
    two.train()
    after = two.evaluate()["eval_loss"]
    alone = _second_alone(tmp_path / "alone", weights, stage)
    assert losses(two) == losses(alone)
    expected, trained = whole_weights(alone), whole_weights(two)
    assert all(torch.equal(trained[name], value) for name, value in expected.items())
    assert after == alone.evaluate()["eval_loss"] != before
    alone.close()

    if first != "deleted":
        one.save_model(str(tmp_path / "saved"))  # the model as it is, whoever trained it
        assert one.evaluate()["eval_loss"] == after
        assert one.deepspeed is None or stage < 3
        if breaks:
            one.pop_callback(callbacks[0])
        one.train()
        assert losses(one)[-1] < losses(two)[0]
        one.close()
        assert two.evaluate()["eval_loss"] < after
    two.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_pass_that_breaks_off_leaves_a_usable_model(
    stage: int, where: str, tmp_path: Path
) -> None:
    """Layers are gathered then, hooks have fired for some; "pop from an empty deque" came next."""
    model = tiny_llama()
    breaking = model.model.layers[1].mlp = _Forward(model.model.layers[1].mlp)
    data = RaggedTokens(16)  # that is trained on
    one = make_trainer(tmp_path / "one", model=model, stage=stage, max_steps=3, evaluation=data)
    weights = whole_weights(one)
    breaking.breaks = where
    with pytest.raises(ZeroDivisionError):
        one.train()
    if where == "forward":
        with pytest.raises(ZeroDivisionError):
            one.evaluate()
    breaking.breaks = ""
    assert all(torch.equal(value, weights[n]) for n, value in whole_weights(one).items())
    loss = one.evaluate()["eval_loss"]
    two = make_trainer(tmp_path / "two", model=model, stage=stage, max_steps=3, evaluation=data)
    two.train()
    assert two.evaluate()["eval_loss"] < loss
    one.train()
    one.close(whole=True)
    two.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_trainings_of_one_model_at_once_are_refused(stage: int, tmp_path: Path) -> None:
    """An evaluation by another Trainer in the middle goes through the engine that trains."""
    from transformers import TrainerCallback

    from dstrain.core.errors import TrainingError

    model = tiny_llama()
    seen: list[float] = []

    class Judge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            other = make_trainer(tmp_path / "other", model=model, stage=stage, bf16=True)
            seen.append(other.evaluate()["eval_loss"])
            with pytest.raises(TrainingError, match="while another one trains it"):
                other.train()

    plain = make_trainer(tmp_path / "plain", stage=stage, max_steps=3)
    plain.train()
    trainer = make_trainer(tmp_path, model=model, stage=stage, max_steps=3, callbacks=[Judge])
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert seen[-1] == trainer.evaluate()["eval_loss"]
    plain.close()
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stages", [(2, 2), (3, 3), (3, 2)], ids=str)
def test_two_models_train_in_turn(stages: tuple[int, int], tmp_path: Path) -> None:
    """Teacher and student, or two sides of a game: each as if it were alone in the process."""
    options: tuple[dict[str, Any], ...] = ({"bf16": True}, {"torch_autocast": stages[1] == 2})
    data = (RaggedTokens(16, seed=5), RaggedTokens(16, seed=6))

    def both(folder: Path) -> list[Any]:
        return [
            make_trainer(
                folder / str(i), stage=stages[i], max_steps=2, data=data[i], model=tiny_llama(),
                **options[i],
            )
            for i in range(2)
        ]  # fmt: skip

    alone: list[list[Any]] = []
    for trainer in both(tmp_path / "alone"):
        trainer.train()
        middle = trainer.evaluate()["eval_loss"]
        trainer.train()
        alone.append([losses(trainer), middle, trainer.evaluate()["eval_loss"]])
        trainer.close()
    first, second = both(tmp_path / "turns")
    first.evaluate()
    second.train()
    first.train()
    middle = [t.evaluate()["eval_loss"] for t in (first, second)]
    first.train()
    second.train()
    last = [t.evaluate()["eval_loss"] for t in (first, second)]
    found = [[losses(t), m, end] for t, m, end in zip((first, second), middle, last, strict=True)]
    assert found == alone
    first.close()
    assert second.evaluate()["eval_loss"] == last[1]
    second.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_wrapper_around_a_trained_model_trains(stage: int, tmp_path: Path) -> None:
    """Another module with the same parameters: their engine is let go as well."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            return {"loss": out.loss, "logits": out.logits}

    model = tiny_llama()
    both: dict[str, Any] = {"stage": stage, "max_steps": 3, "evaluation": RaggedTokens(16)}
    one = make_trainer(tmp_path / "one", model=model, **both)
    one.train()
    loss = one.evaluate()["eval_loss"]
    two = make_trainer(tmp_path / "two", model=Wrapped(model), **both)
    # Targets of a wrapper are not counted as those of the model in it are.
    assert two.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-3)
    two.train()
    trained = two.evaluate()["eval_loss"]
    assert one.evaluate()["eval_loss"] == pytest.approx(trained, rel=1e-3)
    assert trained < 0.999 * loss
    one.close()
    two.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_deleted_trainer_gives_its_memory_back(stage: int, tmp_path: Path) -> None:
    """At the latest when the next training begins, with any model, whoever keeps the old one."""
    linear = torch.nn.functional.linear
    one = make_trainer(tmp_path / "one", stage=stage, max_steps=1, weight_decay=0.1)
    one.train()
    model, refs = one.model, [weakref.ref(one.deepspeed), weakref.ref(one.optimizer)]
    del one
    two = make_trainer(tmp_path / "two", stage=2, max_steps=1)
    two.train()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert torch.nn.functional.linear is linear
    two.close()
    three = make_trainer(tmp_path / "three", model=model, stage=stage, max_steps=1)
    three.train()
    three.close()
