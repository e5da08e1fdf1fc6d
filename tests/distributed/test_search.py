"""Hyperparameter search: the same trial on all ranks, pruned by all, each with its own config."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests import wandb_file
from tests.distributed.runs import make_trainer
from tests.models import tiny_llama_config

optuna = pytest.importorskip("optuna")


def make_searcher(folder: Path, model_init: Any, **arguments: Any) -> Any:
    """Return a trainer with ``model_init`` and little data."""
    from dstrain import Trainer

    class Searcher(Trainer):
        def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
            super().__init__(None, args, **kwargs, model_init=model_init)

    settings = {"train": 8, "evaluation": 4, "learning_rate": 0.5, **arguments}
    return make_trainer(folder, cls=Searcher, **settings)


def on_all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    from dstrain.core.ranks import gather_objects

    return gather_objects(value)


def small_model(trial: Any = None) -> Any:
    """Return a Llama of one layer, or as many as the trial says."""
    from transformers import AutoModelForCausalLM

    layers = 1 if trial is None else trial.suggest_int("layers", 1, 2)
    return AutoModelForCausalLM.from_config(tiny_llama_config(num_hidden_layers=layers))


@pytest.mark.ranks(2)
def test_what_the_main_rank_says_holds_on_all_and_so_do_its_errors(rank: int) -> None:
    from dstrain.core.errors import ConfigError, TrainingError
    from dstrain.core.ranks import from_main, launched_ranks

    ranks, asked = launched_ranks(), []

    def ask(answer: Any) -> Any:
        asked.append(rank)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert from_main(ranks, lambda: ask("yes")) == "yes"
    assert asked == [0] * (rank == 0)
    with pytest.raises(ConfigError, match="mine"):
        from_main(ranks, lambda: ask(ConfigError("mine")))
    expected = KeyError if rank == 0 else TrainingError
    with pytest.raises(expected, match="a name"):
        from_main(ranks, lambda: ask(KeyError("a name")))


@pytest.mark.ranks(2, timeout=240)
def test_optuna_searches_on_all_ranks_together(tmp_path: Path, rank: int) -> None:
    """Catches ranks that train different models, a config of the trial before, and lost results."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    seen: list[Any] = []

    class Watch(TrainerCallback, ExportableState):
        def __init__(self) -> None:
            self.steps = {"of this trial": 0}
            self.collected: list[Any] = []

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"steps": self.steps}}

        def on_step_end(self, *args: Any, **kw: Any) -> None:
            self.steps["of this trial"] += 1

        def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            self.collected.append((self.steps["of this trial"], state.global_step))
            if state.trial_params is None:
                return
            seen.append(
                (
                    dict(state.trial_params),
                    state.trial_name,
                    args.learning_rate,
                    trainer.resolved.micro_batch_size,
                    trainer.deepspeed.train_micro_batch_size_per_gpu(),
                    trainer.model.config.num_hidden_layers,
                    trainer.lr_scheduler.base_lrs[0],
                    state.is_hyper_param_search,
                )
            )

    def hp_space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("batch", [1, 2, 4]),
            "no_such_argument": 1,
        }

    trainer = make_searcher(tmp_path, small_model, stage=3, callbacks=[Watch])
    args = trainer.args
    storage = f"sqlite:///{tmp_path}/study.db"
    best = trainer.hyperparameter_search(
        hp_space,
        n_trials=3,
        backend="optuna",
        storage=storage,
        study_name="test",
        sampler=optuna.samplers.RandomSampler(seed=3),
    )
    assert on_all_ranks(best) == [best] * 2
    assert on_all_ranks(seen) == [seen] * 2
    assert len(seen) == 3
    for number, (params, name, rate, batch, in_engine, layers, base, searching) in enumerate(seen):
        assert params["learning_rate"] == rate == base
        assert params["per_device_train_batch_size"] == batch == in_engine
        assert name == f"run-{number}"
        assert layers in (1, 2)
        assert searching
    assert len({entry[2] for entry in seen}) == 3
    assert trainer.args is args
    assert args.learning_rate == 0.5
    assert not trainer.state.is_hyper_param_search
    if rank == 0:
        study = optuna.load_study(study_name="test", storage=storage)
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3
        assert [t.params["layers"] for t in study.trials] == [entry[5] for entry in seen]
        assert best.objective == study.best_value
        assert best.run_id == str(study.best_trial.number)
        assert best.hyperparameters == study.best_params
        assert all((tmp_path / f"run-{n}" / "resolved_config.json").is_file() for n in range(3))
    trainer.train()  # goes on with the arguments from before the search
    assert trainer.resolved.learning_rate == 0.5
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
    assert len(watch.collected) == 4, "what it keeps for the user is left alone"
    for steps, done in watch.collected:
        assert steps == done, "what it remembers of a run is of one trial"
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_all_ranks_prune_fail_and_go_on_together(tmp_path: Path, rank: int) -> None:
    """transformers raises TrialPruned on rank 0 alone, and the others train on: a hang."""
    from transformers import TrainerCallback

    class PruneTheSecond(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    steps: list[int] = []
    ends: list[str] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.append(0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps[-1] += 1

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(state.trial_name)

    made: list[Any] = []

    def model_init(trial: Any) -> Any:
        made.append(None if trial is None else trial.number)
        if trial is not None and trial.number == 2:
            raise ValueError("this trial cannot be built")
        return small_model()

    trainer = make_searcher(
        tmp_path, model_init, eval_strategy="steps", eval_steps=1, callbacks=[Watch]
    )
    settings = {
        "hp_space": lambda trial: {"learning_rate": trial.suggest_float("rate", 1e-3, 1e-2)},
        "backend": "optuna",
        "hp_name": lambda trial: f"trial {trial.number}",
    }
    best = trainer.hyperparameter_search(
        n_trials=4, pruner=PruneTheSecond(), catch=(ValueError,), **settings
    )
    assert steps == [2, 1, 2], "of trials 0, 1 (pruned at its first evaluation) and 3"
    assert ends == ["trial 0", "trial 1", "trial 3"]
    assert made == [None, 0, 1, 2, 3]
    assert best.run_id in ("0", "3")
    assert on_all_ranks((steps, made, best)) == [(steps, made, best)] * 2
    made.clear()
    with pytest.raises(ValueError, match="this trial cannot be built"):
        trainer.hyperparameter_search(n_trials=4, **settings)
    assert made == [0, 1, 2]
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_several_objectives_give_the_best_trade_offs(tmp_path: Path) -> None:
    trainer = make_searcher(tmp_path, small_model, eval_strategy="epoch")
    found = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("rate", [1e-3, 1e-2])},
        lambda metrics: (metrics["eval_loss"], metrics["eval_loss"]),
        n_trials=2,
        direction=["minimize", "maximize"],
    )
    assert len(found) == 2
    assert all(len(run.objective) == 2 for run in found)
    assert on_all_ranks(found) == [found] * 2
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_sweep_of_wandb_runs_on_all_ranks(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server, which deals out the trials, cannot be here; runs and their records are real."""
    import wandb

    wandb_file.go_offline(tmp_path, monkeypatch)
    asked: dict[str, Any] = {}

    def sweep(config: dict[str, Any], **kwargs: Any) -> str:
        asked.update(config=config, **kwargs)
        return "a-sweep"

    def agent(sweep_id: str, function: Any, count: int, **kwargs: Any) -> None:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep_id)  # as the agent tells wandb.init
        for number in range(count):
            run = wandb.init(id=f"r{number}", config={"learning_rate": 10.0 ** -(number + 1)})
            assert run.sweep_id == "a-sweep"
            function()
            assert wandb.run is run, "a trial is logged where the sweep looks"
            run.finish()

    monkeypatch.setattr(wandb, "sweep", sweep)
    monkeypatch.setattr(wandb, "agent", agent)
    rates: list[float] = []

    def model_init(trial: Any) -> Any:
        rates.append(trainer.args.learning_rate if trial else 0.0)
        return small_model()

    trainer = make_searcher(tmp_path / "out", model_init)
    rates.clear()
    space = {"method": "grid", "parameters": {"learning_rate": {"values": [0.1, 0.01]}}}
    best = trainer.hyperparameter_search(
        lambda trial: space, n_trials=2, backend="wandb", project="p", name="n"
    )
    assert rates == [0.1, 0.01]
    assert on_all_ranks(best) == [best] * 2
    assert best.run_summary == "a-sweep"
    assert best.hyperparameters in ({"learning_rate": 0.1}, {"learning_rate": 0.01})
    if rank == 0:
        metric = {"goal": "minimize", "name": "eval/loss"}
        assert asked == {
            "config": {**space, "metric": metric, "name": "n"},
            "project": "p",
            "entity": None,
        }
    asked.clear()
    assert trainer.hyperparameter_search(backend="wandb", n_trials=1, sweep_id="a-sweep")
    assert asked == {}, "an old sweep goes on"
    trainer.close()


def _ray(calls: dict[str, Any]) -> types.ModuleType:
    """Make as much of ray as a search uses; trials run one by one in this process."""
    ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
    ray.tune = tune  # type: ignore[attr-defined]
    ray.__spec__ = tune.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    trials: list[Any] = []

    def run(trainable: Any, *, config: Any, num_samples: int, **kwargs: Any) -> Any:
        calls.update(kwargs, config=config)
        for number in range(num_samples):
            trials.append(types.SimpleNamespace(trial_id=f"t{number}", config={
                name: draw(number) for name, draw in config.items()
            }, last_result=None))  # fmt: skip
            trainable(trials[-1].config)
        return types.SimpleNamespace(get_best_trial=best)

    def best(metric: str, mode: str, scope: str) -> Any:
        calls.update(scope=scope, metric=metric, mode=mode)
        return min(trials, key=lambda t: t.last_result[metric])

    tune.run = run  # type: ignore[attr-defined]
    tune.report = lambda metrics: setattr(trials[-1], "last_result", metrics)  # type: ignore
    tune.with_parameters = lambda f, **kw: lambda config: f(config, **kw)  # type: ignore
    tune.CLIReporter = lambda metric_columns: metric_columns  # type: ignore[attr-defined]
    tune.get_context = lambda: types.SimpleNamespace(  # type: ignore[attr-defined]
        get_trial_id=lambda: trials[-1].trial_id
    )
    return ray


@pytest.mark.ranks(1)
@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_ray_runs_trials_and_chooses_by_the_scope(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}
    ray = _ray(calls)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.tune", ray.tune)
    trainer = make_searcher(
        tmp_path, small_model_without_trial, eval_strategy=strategy, ray_scope="all"
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": lambda number: 10.0 ** -(number + 2)},
        n_trials=2,
        backend="ray",
    )
    assert calls["scope"] == "all"
    assert (calls["metric"], calls["mode"]) == ("objective", "min")
    assert calls["resources_per_trial"]["cpu"] == 1
    assert (
        best.objective
        == best.run_summary.get_best_trial("objective", "min", "all").last_result["objective"]
    )
    assert best.hyperparameters["learning_rate"] in (0.01, 0.001)
    assert sorted(p.name for p in tmp_path.glob("run-*")) == ["run-t0", "run-t1"]
    trainer.train()
    trainer.close()


def small_model_without_trial() -> Any:
    return small_model()


@pytest.mark.ranks(1)
def test_hyperparameters_can_be_given_to_train(tmp_path: Path) -> None:
    """For one training; the next has the arguments as they are."""
    trainer = make_trainer(tmp_path, learning_rate=0.5, train=8)
    trainer.train(trial={"learning_rate": 0.25, "num_train_epochs": 2})
    assert set(trainer.lr_scheduler.base_lrs) == {0.25}
    assert trainer.state.global_step == 8
    assert trainer.args.output_dir == str(tmp_path)
    trainer.train()
    assert set(trainer.lr_scheduler.base_lrs) == {0.5}
    assert trainer.state.global_step == 4
    trainer.close()


@pytest.mark.ranks(2)
def test_a_search_that_cannot_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstrain.core.errors import ConfigError

    plain = make_trainer(tmp_path)
    for backend, match in {
        "sigopt": "its service was shut down",
        "optima": "no such backend",
        "ray": "'ray\\[tune\\]'",
        "optuna": "every trial starts from a new model",
    }.items():
        with pytest.raises(ConfigError, match=match):
            plain.hyperparameter_search(backend=backend)
    trainer = make_searcher(tmp_path, small_model_without_trial)
    with pytest.raises(ConfigError, match="one trial runs at a time"):
        trainer.hyperparameter_search(backend="optuna", n_jobs=2)
    with pytest.raises(ConfigError, match="a sweep of W&B has one objective"):
        trainer.hyperparameter_search(backend="wandb", direction=["minimize"])
    ray = _ray({})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.tune", ray.tune)
    with pytest.raises(ConfigError, match="backend='ray' on 2 ranks"):
        trainer.hyperparameter_search(lambda trial: {}, backend="ray")
    monkeypatch.setattr("dstrain.search.trials.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="no backend is installed"):
        trainer.hyperparameter_search()
    trainer.close()
