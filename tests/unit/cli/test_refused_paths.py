"""Paths of the user's in folders that may not be read: one error that names the path."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import explain
from dstrain.cli.main import main
from dstrain.cli.model import local_folder
from dstrain.config.memory.model_spec import read_spec
from dstrain.core.errors import CheckpointError, ConfigError, DataError, DstrainError, ModelError
from dstrain.models import check_model_folder

PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CAPABILITY_VERSION_3 = 0x20080522


def drop_powers() -> None:
    """Have permissions count in this process although root runs it: drop what overrides them."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    mask = ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH) & 0xFFFFFFFF
    for sort in range(3):
        data[sort] &= mask
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def refused(act: Callable[[], Any], path: Path, kind: type[DstrainError]) -> bool:
    """Tell whether ``act`` raises that kind of error, which names the path, without powers."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing was raised"
        try:
            drop_powers()
            act()
        except kind as error:
            said = str(error)
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as told:
        said = told.read()
    os.waitpid(pid, 0)
    assert str(path) in said, said
    assert "Traceback" not in said, said
    return "ermission" in said


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "locked"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "config.json").write_text('{"model_type": "gpt2"}')
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (check_model_folder, ModelError),
        (local_folder, ModelError),
        (lambda path: read_spec(f"{path}/config.json"), ModelError),
        (lambda path: explain.run(["--diff", path]), ConfigError),
        (lambda path: explain.run(["--deepspeed", f"{path}/config.json"]), ConfigError),
    ],
    ids=["model", "config", "spec", "record", "deepspeed"],
)
def test_a_folder_that_may_not_be_read_is_an_error(locked, inside, act, kind):
    path = locked / "inner" if inside else locked
    assert refused(lambda: act(str(path)), path, kind)


def test_data_in_a_folder_that_may_not_be_read_is_an_error(locked):
    from dstrain.tasks.common.files import file_origin

    path = locked / "inner" / "a.txt"
    assert refused(lambda: file_origin(str(path), "train_file"), path, DataError)


@pytest.mark.parametrize("wanted", [True, None])
def test_a_checkpoint_in_a_folder_that_may_not_be_read_is_an_error(locked, wanted):
    from dstrain.checkpoint import check_resumable, choose_checkpoint
    from dstrain.core.ranks import Ranks

    folder = locked / "inner"
    given = wanted or str(folder)
    assert refused(lambda: check_resumable(given, locked), locked, CheckpointError)
    assert refused(lambda: choose_checkpoint(given, locked, Ranks()), locked, CheckpointError)


@pytest.mark.parametrize(
    "words", [["ls"], ["verify"], ["diff", "."], ["export", "out"], ["import", "out"]]
)
def test_actions_on_checkpoints_that_may_not_be_read_end_with_an_error(locked, words, capfd):
    action, *more = words

    def act() -> None:
        status = main(["checkpoint", action, str(locked), *more])
        raise CheckpointError(f"{status}: {capfd.readouterr().err}")

    assert refused(act, locked, CheckpointError)
