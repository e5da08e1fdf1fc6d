"""Uploads in the background: their order, what they replace, what they hold, and how they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.hub.publisher import Publisher, Upload
from tests.hub_server import Hub, hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol
        yield server


@pytest.fixture
def publisher(hub: Hub) -> Publisher:
    return Publisher("run", token="secret", private=None)


def test_uploads_are_commits_in_their_order_with_exact_content(hub, publisher, tmp_path):
    large = tmp_path / "model.safetensors"
    large.write_bytes(bytes(range(256)) * 1000)
    hub.gate.clear()
    held = contextlib.ExitStack()
    ended: list[bool] = []
    held.callback(ended.append, True)
    first = publisher.submit(Upload("first", {"model.safetensors": large}, held=held))
    second = publisher.submit(Upload("second", {"README.md": b"# A card\n"}))
    assert publisher.is_busy
    assert not ended
    hub.gate.set()
    publisher.wait()
    assert not publisher.is_busy
    assert ended
    assert first.result().commit_message == "first"
    assert second.result().commit_message == "second"
    repository = hub.repositories["me/run"]
    assert [message for message, _ in repository.commits] == ["first", "second"]
    assert repository.files == {
        "model.safetensors": large.read_bytes(),
        "README.md": b"# A card\n",
    }
    assert publisher.repo_id == "me/run"
    assert hub.tokens == {"secret"}


def test_files_of_an_earlier_checkpoint_do_not_stay_in_its_place(hub, publisher):
    """A checkpoint of four ranks would keep the slices of eight."""
    publisher.commit(Upload("a", {"last-checkpoint/1": b"1", "last-checkpoint/2": b"2", "x": b"x"}))
    publisher.commit(
        Upload("b", {"last-checkpoint/1": b"one", "y": b"y"}, replaces="last-checkpoint")
    )
    assert hub.repositories["me/run"].files == {"last-checkpoint/1": b"one", "x": b"x", "y": b"y"}
    assert len(hub.repositories["me/run"].commits) == 2, "one commit each, so never half of it"


def test_a_failing_upload_is_told_and_the_next_one_works(hub, publisher, caplog):
    held = contextlib.ExitStack()
    ended: list[bool] = []
    held.callback(ended.append, True)
    hub.failing = True
    lost = publisher.submit(Upload("lost", {"x": b"1"}, held=held))
    publisher.wait()
    assert "'lost' was not uploaded to run" in caplog.text
    assert "secret" not in caplog.text
    assert lost.exception() is not None
    assert ended, "a folder must not be held for ever"
    hub.failing = False
    publisher.submit(Upload("made", {"x": b"2"})).result(timeout=30)
    publisher.wait()
    assert hub.repositories["me/run"].files == {"x": b"2"}


def test_a_file_that_is_gone_is_a_failure_like_any_other(hub, publisher, tmp_path: Path):
    gone = publisher.submit(Upload("gone", {"x": tmp_path / "gone"}))
    publisher.wait()
    assert gone.exception() is not None


def test_nobody_at_the_other_end(publisher, monkeypatch):
    """No network at all: the error comes, and soon."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    lost = publisher.submit(Upload("lost", {"x": b"1"}))
    publisher.wait()
    assert lost.exception() is not None
