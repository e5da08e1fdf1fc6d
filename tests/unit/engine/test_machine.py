"""Memory that ranks find, and what they agree on."""

from __future__ import annotations

import os

import pytest

from dstrain.config import Machine
from dstrain.core.ranks import Ranks
from dstrain.engine.machine import host_memory_bytes, least, read_machine


def test_ranks_agree_on_what_all_of_them_have():
    """A machine with less, or with more ranks, decides for all."""
    found = least([Machine(4, 80, 1000, 50), Machine(8, 60, 2000, 70)])
    assert found == Machine(8, 60, 1000, 50)
    assert least([Machine(1, 80, 10, None), Machine(1, 80, 10, 70)]).nvme_bytes is None


@pytest.mark.parametrize(("content", "limits"), [("4096\n", True), ("max\n", False), ("", False)])
def test_a_container_s_limit_counts(tmp_path, content, limits):
    path = tmp_path / "memory.max"
    path.write_text(content)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory_bytes([str(path)]) == (4096 if limits else whole)
    assert host_memory_bytes([str(tmp_path / "none")]) == whole


def test_ranks_on_the_cpu_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = read_machine(Ranks(world_size=4, local_world_size=4), disk=str(tmp_path))
    assert found.ranks == 4
    assert found.device_bytes == host_memory_bytes() // 4
    assert found.host_bytes == host_memory_bytes()
    assert found.nvme_bytes is not None
    assert found.nvme_bytes > 0
    assert read_machine(Ranks(), disk=str(tmp_path / "none")).nvme_bytes is None
    assert read_machine(Ranks()).nvme_bytes is None
