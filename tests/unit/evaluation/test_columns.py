"""Predictions taken apart, kept in memory or files, and put together: the same either way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from dstrain.core.errors import DataError
from dstrain.core.records import plain_numbers
from dstrain.evaluation.columns import Columns, join
from dstrain.evaluation.nested import take_apart
from dstrain.evaluation.pages import releasing_pages


def _columns(blocks: list[torch.Tensor], folder: Path, limit: int, *, concat: bool = True) -> Any:
    columns = Columns(1, memory_bytes=limit, folder=folder)
    for index, block in enumerate(blocks):
        columns.add(0, block)
        if index % 2:
            columns.end_step()
    if len(blocks) % 2:
        columns.end_step()
    return columns.finish(concat=concat)[0]


def _ragged(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return blocks of different heights and widths, one without rows and wider than all others."""
    shapes = [(2, 3, 2), (1, 5, 2), (0, 9, 9), (3, 1, 4), (2, 5, 4)]
    return [torch.arange(np.prod(s)).reshape(s).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("limit", [0, 100, 2**30])
def test_ragged_blocks_are_padded_alike_in_memory_and_in_files(
    dtype: torch.dtype, limit: int, tmp_path: Path
) -> None:
    """Catches wrong offsets, the padding of stand-ins, and formats that numpy lacks."""
    blocks = _ragged(dtype)
    whole = _columns(blocks, tmp_path, limit)
    assert whole.shape == (8, 5, 4)
    assert whole.dtype == (np.float32 if dtype == torch.bfloat16 else blocks[0].numpy().dtype)
    row = 0
    for block in filter(len, blocks):
        part = whole[row : row + len(block)]
        inside = (slice(None), slice(block.shape[1]), slice(block.shape[2]))
        assert np.array_equal(part[inside], block.float().numpy())
        assert (np.delete(part, np.s_[: block.shape[1]], axis=1) == -100).all()
        assert (np.delete(part, np.s_[: block.shape[2]], axis=2) == -100).all()
        row += len(block)
    assert row == 8
    assert isinstance(whole, np.memmap) == (limit < 2**30)
    whole[0] = 0  # metrics may change what they get
    assert np.array_equal(join(blocks).float().numpy(), _columns(blocks, tmp_path, limit))
    assert not list(tmp_path.iterdir()), "the files have no names"


@pytest.mark.parametrize("limit", [0, 2**30])
def test_batches_apart_are_padded_within_each(limit: int, tmp_path: Path) -> None:
    """eval_do_concat_batches=False: a step's blocks of all ranks form one array."""
    blocks = [*_ragged(torch.float32), torch.ones(1, 5, 4)]
    parts = _columns(blocks, tmp_path, limit, concat=False)
    assert [p.shape for p in parts] == [(3, 5, 2), (3, 1, 4), (3, 5, 4)]
    assert parts[1].tolist() == blocks[3].tolist()
    assert parts[0][0, :3].tolist() == blocks[0][0].tolist()
    assert (parts[0][0, 3:] == -100).all()


def test_flags_and_bytes_become_numbers_that_can_hold_the_padding(tmp_path: Path) -> None:
    """-100 as a bool would be True, and as a byte 156."""
    for dtype in (torch.bool, torch.uint8):
        blocks = [torch.ones(1, 2).to(dtype), torch.zeros(1, 3).to(dtype)]
        for limit in (0, 2**20):
            assert _columns(blocks, tmp_path, limit).tolist() == [[1, 1, -100], [0, 0, 0]]
        assert join(blocks).tolist() == [[1, 1, -100], [0, 0, 0]]
        even = _columns([blocks[0], blocks[0]], tmp_path, 2**20)
        assert even.dtype == (np.bool_ if dtype == torch.bool else np.uint8)


def test_only_what_is_too_large_leaves_memory(tmp_path: Path) -> None:
    """Labels stay in memory beside logits that do not."""
    columns = Columns(2, memory_bytes=1000, folder=tmp_path)
    for _ in range(10):
        columns.add(0, torch.zeros(10, 10))
        columns.add(1, torch.zeros(10, dtype=torch.int64))
        columns.end_step()
    large, small = columns.finish(concat=True)
    assert isinstance(large, np.memmap)
    assert not isinstance(small, np.memmap)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_what_stays_does_not_cut_the_heap_in_pieces(tmp_path: Path) -> None:
    """Labels that are kept between logits that come and go: these found no room a second time."""
    columns = Columns(2, memory_bytes=2**22, folder=tmp_path)
    torch.ones(2**22)  # from then on the C library takes tensors of 8 MB from the heap
    before = _anonymous_bytes()
    for _ in range(20):
        own, other = torch.ones(2**21), torch.zeros(2**21)
        columns.add(0, own)
        columns.add(1, torch.zeros(256, dtype=torch.int64))
        del own
        columns.add(0, other)
        del other
        columns.add(1, torch.zeros(256, dtype=torch.int64))
        columns.end_step()
    assert _anonymous_bytes() - before < 60e6
    large, small = columns.finish(concat=True)
    assert large.shape == (40 * 2**21,)
    assert not small.any()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_pages_that_a_metric_reads_do_not_pile_up(tmp_path: Path) -> None:
    """200 MB read from end to end; what is changed in place is kept."""
    columns = Columns(1, memory_bytes=0, folder=tmp_path)
    for _ in range(200):
        columns.add(0, torch.ones(1, 2**18))
    (whole,) = columns.finish(concat=True)
    before, most = _file_pages_bytes(), 0
    with releasing_pages((whole, {"none": None})):
        for row in whole:
            row[0] = 2
            assert float(row.sum()) == 2**18 + 1
            time.sleep(0.002)
            most = max(most, _file_pages_bytes() - before)
    assert most < 100e6
    assert whole.sum() == 200 * (2**18 + 1)


def _file_pages_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")


def test_any_nesting_is_put_together_again() -> None:
    """Tuples, lists, dicts of the library, None, numbers and 0-d tensors."""
    value = ([torch.ones(2), None], BatchEncoding({"a": torch.tensor(1.0), "b": (np.ones(3), 2)}))
    layout, leaves = take_apart(value, "predictions")
    assert [tuple(leaf.shape) for leaf in leaves] == [(2,), (1,), (3,), (1,)]
    again = layout.fill(iter(range(4)))
    assert again == ([0, None], {"a": 1, "b": (2, 3)})
    assert take_apart(value, "x")[0] == layout
    with pytest.raises(DataError, match=r"predictions\[1\]\['b'\] is a str"):
        take_apart((torch.ones(1), {"b": "text"}), "predictions")


def test_metrics_become_plain_numbers() -> None:
    """A record must be JSON."""
    given = {"a": np.float32(0.5), "b": torch.tensor(2), "c": [np.int64(1)], "d": torch.ones(1)}
    assert plain_numbers(given) == {"a": 0.5, "b": 2, "c": [1], "d": 1.0}
    assert [type(v) for v in plain_numbers(given).values()] == [float, int, list, float]
