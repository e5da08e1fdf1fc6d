"""Uploads to a hub on this machine: what, when, from where; and a hub that fails or is slow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import losses, make_trainer
from tests.hub_server import Hub, hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Give a hub of each rank's own; only the main rank ever speaks to one."""
    from huggingface_hub import constants

    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol
        yield server


class Tokenizer:
    """Saved with the model, like any tokenizer."""

    def save_pretrained(self, folder: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def make_publisher(folder: Path, **arguments: Any) -> Any:
    settings = {"push_to_hub": True, "hub_token": "secret", "save_strategy": "steps"}
    settings |= {"save_steps": 2, "train": 16, "evaluation": 4, **arguments}
    trainer = make_trainer(folder / "model-of-a-test", **settings)
    trainer.processing_class = Tokenizer()
    return trainer


MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
MODEL |= {"tokenizer.json", "resolved_config.json", "training_arguments.json"}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_what_each_strategy_uploads(strategy: str, tmp_path: Path, rank: int, hub: Hub) -> None:
    """From the committed checkpoint, byte for byte; the other ranks upload nothing."""
    trainer = make_publisher(
        tmp_path, hub_strategy=strategy, hub_private_repo=True, hub_always_push=True, stage=3
    )
    trainer.train()
    trainer.close()
    folder = tmp_path / "model-of-a-test"
    if rank:
        assert trainer.hub_model_id is None
        assert hub.repositories == {}
    else:
        assert trainer.hub_model_id == "me/model-of-a-test"
        assert hub.tokens == {"secret"}
        repository = hub.repositories["me/model-of-a-test"]
        assert repository.visibility == "private"
        messages = [message for message, _ in repository.commits]
        steps = [] if strategy == "end" else ["step 2", "step 4"]
        assert messages == [f"Training in progress, {step}" for step in steps]
        top = {path for path in repository.files if "/" not in path}
        assert top == (set() if strategy == "end" else MODEL)
        places = {
            "checkpoint": {"last-checkpoint": "checkpoint-4"},
            "all_checkpoints": {f"checkpoint-{n}": f"checkpoint-{n}" for n in (2, 4)},
        }.get(strategy, {})
        assert {path.split("/")[0] for path in repository.files if "/" in path} == set(places)
        for place, name in places.items():
            local = {
                p.relative_to(folder / name).as_posix(): p.read_bytes()
                for p in (folder / name).rglob("*")
                if p.is_file()
            }
            assert local == {
                path.removeprefix(f"{place}/"): content
                for path, content in repository.files.items()
                if path.startswith(f"{place}/")
            }
        if top:
            weights = (folder / "checkpoint-4" / "model.safetensors").read_bytes()
            assert repository.files["model.safetensors"] == weights
    trainer.save_model()
    if not rank:
        assert hub.repositories["me/model-of-a-test"].commits[-1][0] == "Model save"
        files = hub.repositories["me/model-of-a-test"].files
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert set(files) >= {"README.md", "config.json", "tokenizer.json"}
    trainer.close()


@pytest.mark.ranks(2)
def test_pushing_by_hand(tmp_path: Path, rank: int, hub: Hub) -> None:
    """Into another repository, in the background, with the wishes for the card."""
    trainer = make_publisher(tmp_path, push_to_hub=False, hub_model_id="team/name", hub_token=None)
    trainer.train()
    pushed = trainer.push_to_hub(
        "by hand",
        blocking=False,
        token="other",
        private=False,
        revision="dev",
        tags=["mine"],
        language="en",
    )
    folder = tmp_path / "model-of-a-test"
    if rank:
        assert pushed is None
    else:
        assert pushed.result(timeout=60).commit_message == "by hand"
        assert hub.tokens == {"other"}
        repository = hub.repositories["team/name"]
        assert repository.visibility == "public"
        assert repository.branches == ["dev"]
        assert not any(path.startswith(("checkpoint-", ".")) for path in repository.files)
        card = repository.files["README.md"].decode()
        assert card == (folder / "README.md").read_text()
        assert "\n# name\n" in card
        assert "- mine\n" in card
        trainer._publisher.wait()
        assert list(folder.glob(".upload-*")) == []
    assert trainer.push_to_hub() is None or not rank
    trainer.close()


@pytest.mark.ranks(2)
def test_a_failing_hub_never_stops_training(
    tmp_path: Path, rank: int, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at the start, at a checkpoint or at the end; it says so, and works once the hub does."""
    hub.failing = True
    with caplog.at_level(logging.ERROR, logger="dstrain"):
        trainer = make_publisher(tmp_path)
        trainer.train()
        assert len(losses(trainer)) == 4
        trainer.save_model()
    if not rank:
        assert "the repository cannot be made" in caplog.text
        assert "'Training in progress, step 2' was not uploaded" in caplog.text
        assert "the model was not uploaded" in caplog.text
        assert "secret" not in caplog.text
        assert (tmp_path / "model-of-a-test" / "model.safetensors").is_file()
        with pytest.raises(Exception, match="out of order|403"):
            trainer.init_hf_repo()
    hub.failing = False
    trainer.save_model()
    if not rank:
        assert len(hub.repositories["me/model-of-a-test"].commits) == 1
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("always", [False, True])
def test_a_slow_hub_keeps_its_checkpoint_and_skips_or_queues(
    always: bool, tmp_path: Path, rank: int, hub: Hub
) -> None:
    """save_total_limit=1 would remove the folder that is being uploaded."""
    from transformers import TrainerCallback

    hub.gate.clear()
    there: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step == 4:  # checkpoint-3 is committed, and 1 still on its way
                there.append((tmp_path / "model-of-a-test" / "checkpoint-1").is_dir())
                hub.gate.set()

    trainer = make_publisher(
        tmp_path,
        save_steps=1,
        save_total_limit=1,
        save_async=False,
        hub_always_push=always,
        callbacks=[Watch],
    )
    trainer.train()
    if not rank:
        assert there == [True]
        messages = [m.split()[-1] for m, _ in hub.repositories["me/model-of-a-test"].commits]
        assert messages[0] == "1"
        assert (messages == ["1", "2", "3", "4"]) == always
        assert "2" in messages if always else "2" not in messages
    trainer.close()


@pytest.mark.ranks(2)
def test_the_card_has_the_results_arguments_and_versions_of_the_run(
    tmp_path: Path, rank: int
) -> None:
    from huggingface_hub import ModelCard

    from dstrain import __version__

    trainer = make_trainer(
        tmp_path, eval_strategy="epoch", num_train_epochs=2, weight_decay=0.125, stage=3
    )
    trainer.train()
    trainer.create_model_card(
        language="en",
        license="mit",
        tags="a",
        model_name="A name",
        finetuned_from="someone/base",
        tasks="text-generation",
        dataset_tags="wiki",
        dataset="Wiki",
        dataset_args="en",
    )
    if rank:
        return
    text = (tmp_path / "README.md").read_text()
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.language, data.license, data.base_model) == ("en", "mit", "someone/base")
    assert data.library_name == "transformers"
    assert data.datasets == ["wiki"]
    (result,) = data.eval_results
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert result.metric_value == evaluated[-1]
    assert (result.task_type, result.dataset_type) == ("text-generation", "wiki")
    assert (result.dataset_name, result.dataset_config) == ("Wiki", "en")
    assert f"- Loss: {evaluated[-1]:.4g}" in text
    for loss in evaluated:
        assert f" {loss:.4g} |" in text
    assert "| weight_decay | `0.125` |" in text
    assert "| ZeRO stage | `3` |" in text
    assert "| global batch size | `4` |" in text
    assert f"- dstrain {__version__}" in text
    trainer.create_model_card(tags=["b"])  # over a card that is there
    assert {"a", "b", "generated_from_trainer"} <= set(
        ModelCard.load(tmp_path / "README.md").data.tags
    )
    trainer.close()


@pytest.mark.ranks(1)
def test_checkpoints_without_a_model_are_not_to_be_published(tmp_path: Path) -> None:
    from dstrain.core.errors import ConfigError

    with pytest.raises(ConfigError, match="uploaded from its checkpoints"):
        make_publisher(tmp_path, save_weights_with_checkpoint=False)


@pytest.mark.ranks(1)
def test_uploads_go_to_the_branch_that_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    trainer = make_publisher(tmp_path, hub_revision="trial", hub_strategy="checkpoint", stage=0)
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub(revision="other")
    trainer.close()
    branches = hub.repositories["me/model-of-a-test"].branches
    assert set(branches[:-1]) == {"trial"}
    assert branches[-1] == "other"
    assert len(branches) > 2
