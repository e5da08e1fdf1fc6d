"""The needs of NVMe offload: folders that can be written, and an op that can be built."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, resolve
from dstrain.core.errors import ConfigError
from dstrain.engine import ops
from dstrain.engine.optimizers.nvme import nvme_folders, prepare_nvme


def resolved(**arguments: Any):
    return resolve(TrainingArguments(**arguments), Facts())


def on_disk(path: Path):
    return resolved(offload_optimizer="nvme", offload_param="nvme", nvme_path=str(path))


def test_without_nvme_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(ops, "check_buildable", lambda name: pytest.fail("looked"))
    prepare_nvme(resolved(offload_optimizer="cpu"))


def test_a_folder_that_does_not_exist_is_refused_for_each_key(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepare_nvme(on_disk(tmp_path / "nowhere"))
    assert [p.what.split("=")[0] for p in caught.value.problems] == list(
        nvme_folders(on_disk(tmp_path))
    )
    assert all("no such folder" in p.why for p in caught.value.problems)


def test_a_folder_that_cannot_be_written_is_refused():
    if not os.path.isdir("/proc/1"):
        pytest.skip("needs a folder that nobody can write to")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_nvme(on_disk(Path("/proc/1")))


def test_the_op_is_checked_then_built(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "check_buildable", lambda name: asked.append(("check", name)))
    monkeypatch.setattr(ops, "build_ops", lambda names: asked.append(("build", *names)))
    prepare_nvme(on_disk(tmp_path))
    assert asked == [("check", "async_io"), ("build", "async_io")]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("compatible", [True, False])
def test_an_op_that_lacks_a_library_is_refused_before_its_build(tmp_path, monkeypatch, compatible):
    """A build of five minutes must not be where a missing header is found."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    builder = types.SimpleNamespace(is_compatible=lambda verbose: compatible)
    monkeypatch.setattr(ops, "_builder", lambda name: builder)
    if compatible:
        ops.check_buildable("async_io")
        return
    with pytest.raises(ConfigError, match="apt-get install libaio-dev"):
        ops.check_buildable("async_io")
