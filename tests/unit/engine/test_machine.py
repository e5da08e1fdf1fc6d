"""Memory that ranks find, and what they agree on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dstrain.config import Machine
from dstrain.core.host import available_bytes, total_bytes
from dstrain.core.ranks import Ranks
from dstrain.engine.machine import free_memory_bytes, least, read_machine


def test_ranks_agree_on_what_all_of_them_have():
    """A machine with less, or with more ranks, decides for all."""
    found = least([Machine(4, 80, 1000, 50), Machine(8, 60, 2000, 70)])
    assert found == Machine(8, 60, 1000, 50)
    assert least([Machine(1, 80, 10, None), Machine(1, 80, 10, 70)]).nvme_bytes is None


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
INSIDE = {
    f"{V2}/memory.max": "4000\n",
    f"{V2}/memory.current": "3000\n",
    f"{V2}/memory.stat": "anon 1\ninactive_file 500\nactive_file 7\n",
}


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, None, None),
        (INSIDE, 4000, 1500),
        (INSIDE | {f"{V2}/memory.max": "max\n"}, None, None),
        (INSIDE | {f"{V2}/memory.max": ""}, None, None),
        (INSIDE | {f"{V2}/memory.current": "9000"}, 4000, 0),
        (INSIDE | {"proc/meminfo": "MemFree: 0 kB\nMemAvailable: 1 kB\n"}, 4000, 1024),
        # Its path is of the machine around the container, which does not see it.
        (INSIDE | {"proc/self/cgroup": "0::/docker/abc\n"}, 4000, 1500),
        (INSIDE | {"proc/self/cgroup": "0::/../../x\n"}, 4000, 1500),
        # A batch system's group, in a group of a user that may use less.
        (
            {
                "proc/self/cgroup": "0::/slurm/user/job\n",
                f"{V2}/slurm/memory.max": "max",
                f"{V2}/slurm/user/memory.max": "800",
                f"{V2}/slurm/user/memory.current": "700",
                f"{V2}/slurm/user/job/memory.max": "900",
                f"{V2}/slurm/user/job/memory.current": "300",
            },
            800,
            100,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/job\n1:name=systemd:/x\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1}/job/memory.limit_in_bytes": "2000",
                f"{V1}/job/memory.usage_in_bytes": "1500",
                f"{V1}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            2000,
            700,
        ),
        ({f"{V1}/memory.limit_in_bytes": "2000"}, 2000, 2000),
    ],
)
def test_limits_of_all_groups_around_a_process_count(tmp_path, files, total, available):
    write(tmp_path, files)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total_bytes(root=tmp_path) == (total or whole)
    assert available_bytes(root=tmp_path) == available


def test_what_is_free_is_never_more_than_what_there_is(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    available = available_bytes()
    assert available is not None
    assert 0 < available <= total_bytes()
    ranks = Ranks(world_size=4, local_world_size=4)
    assert free_memory_bytes(ranks) == pytest.approx(available / 4, rel=0.2)


def test_ranks_on_the_cpu_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = read_machine(Ranks(world_size=4, local_world_size=4), disk=str(tmp_path))
    assert found.ranks == 4
    assert found.device_bytes == total_bytes() // 4
    assert found.host_bytes == total_bytes()
    assert found.nvme_bytes is not None
    assert found.nvme_bytes > 0
    assert read_machine(Ranks(), disk=str(tmp_path / "none")).nvme_bytes is None
    assert read_machine(Ranks()).nvme_bytes is None
