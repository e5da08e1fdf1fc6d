"""Places to which nothing can be written: one error that names them, before anything is read."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import folders, new_folder
from dstrain.cli.main import main
from dstrain.core.errors import CheckpointError, ConfigError, DataError, ModelError
from dstrain.models import check_model_folder, check_writable
from tests.unit.checkpoint.small import make_checkpoint

GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10
NOT_UTF8 = os.fsdecode(b"o_\xff")


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


def looping(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


PLACES = {
    "below a file": (below_a_file, "file is a file, not a folder"),
    "in /proc": (lambda folder: Path("/proc/zz"), "No such file"),
    "of a long name": (lambda folder: folder / ("n" * 300), "name too long"),
    "of a long name in a new folder": (lambda folder: folder / "new" / ("n" * 300), "too long"),
    "a looping link": (looping, "loop is a link that leads nowhere: to 'loop'"),
    "in a looping link": (lambda folder: looping(folder) / "out", "loop is a link"),
    "a file": (lambda folder: below_a_file(folder).parent, "is a file"),
}
ACTIONS = {"export": [], "convert": ["--to", "deepspeed"], "import": []}


def refused(folder: Path, action: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run an action on a small checkpoint, to ``out``; return its error."""
    made = make_checkpoint(folder / "run", 4)
    before = sorted(p.name for p in folder.rglob("*"))
    assert main(["checkpoint", action, str(made), str(out), *ACTIONS[action]]) == 2
    said = capsys.readouterr().err
    assert str(out) in said
    assert "Traceback" not in said
    assert ".writing-" not in said
    assert sorted(p.name for p in folder.rglob("*")) == before
    return said


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_destination_that_cannot_be_made_is_one_error(action, place, tmp_path, capsys):
    make, why = PLACES[place]
    assert why in refused(tmp_path, action, make(tmp_path), capsys)


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Path]:
    """Make a folder that not even root may write in."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flags = struct.unpack("l", fcntl.ioctl(descriptor, GET_FLAGS, bytes(8)))[0]
        fcntl.ioctl(descriptor, SET_FLAGS, struct.pack("l", flags | IMMUTABLE))
    except OSError as error:
        os.close(descriptor)
        pytest.skip(f"no immutable folders here: {error}")
    yield folder
    fcntl.ioctl(descriptor, SET_FLAGS, struct.pack("l", flags))
    os.close(descriptor)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_folder_that_nobody_may_write_in_is_named_as_the_user_did(
    action, immutable, tmp_path, capsys
):
    assert "ermi" in refused(tmp_path, action, immutable / "out", capsys)


def test_a_name_as_long_as_the_system_allows_can_be_used(tmp_path):
    out = tmp_path / ("ü" * 127)
    new_folder.check_new(out)
    with new_folder.filled_atomically(out) as staging:
        (staging / "a").write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_an_error_in_writing_names_the_folder_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(CheckpointError, match="out' cannot be written\n.*No space left"),
        new_folder.filled_atomically(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(FileNotFoundError),
        new_folder.filled_atomically(tmp_path / "out"),
    ):
        (tmp_path / "source").read_bytes()  # what is read is no fault of the destination
    assert not folders.named(tmp_path)


def test_a_list_of_no_folder_is_an_error(tmp_path, capsys):
    assert main(["checkpoint", "ls", str(tmp_path / "nofolder")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert "no checkpoint in" in capsys.readouterr().out


# --- names that are no UTF-8 ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["output_dir", "logging_dir", "nvme_path"])
def test_arguments_that_are_no_utf8_are_refused_at_once(name):
    values = {"output_dir": "out", name: NOT_UTF8}
    with pytest.raises(ConfigError, match="is not valid UTF-8") as error:
        TrainingArguments(**values)
    assert f"{name}='o_\\udcff'" in str(error.value)


def test_folders_of_models_and_data_that_are_no_utf8_are_refused(tmp_path, monkeypatch):
    import datasets

    from dstrain.tasks.common.cache import cache_told
    from dstrain.tasks.common.tokenizer import prepare_tokenizer

    folder = tmp_path / NOT_UTF8
    with pytest.raises(ModelError, match="model_name_or_path=.*\n.*is not valid UTF-8"):
        check_model_folder(str(folder))
    with pytest.raises(ModelError, match="output_dir=.*\n.*is not valid UTF-8"):
        check_writable(folder)
    with pytest.raises(DataError, match="tokenizer_name=.*\n.*is not valid UTF-8"):
        prepare_tokenizer([], name=str(folder), vocab_size=300, fingerprint=None, text_of=str)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    with pytest.raises(DataError, match="HF_DATASETS_CACHE=.*\n.*is not valid UTF-8"), cache_told():
        pass
    assert not folder.exists()


def test_the_command_refuses_it_before_it_trains(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "causal-lm", "--output_dir", str(tmp_path / NOT_UTF8)]) == 2
    said = capsys.readouterr().err
    assert said.count("is not valid UTF-8") == 1
    assert "\\udcff" in said
    assert list(tmp_path.iterdir()) == []
