"""Tensor files written and read piece by piece."""

from __future__ import annotations

import random

import pytest
import torch

from dstrain.core.files import record_of, write_bytes
from dstrain.models.tensor_file import Stored, TensorReader, write_tensor_file


def test_tensor_files_are_what_safetensors_reads(tmp_path):
    """Every format, odd lengths, an empty and a scalar tensor, values bit for bit."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    draw = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=draw).to(torch.bfloat16),
        "a": torch.randn(7, generator=draw),
        "h": torch.randn(1, generator=draw).half(),
        "d": torch.randn(2, 2, generator=draw).double(),
        "i": torch.tensor([-(2**40), 3]),
        "u": torch.arange(5, dtype=torch.uint8),
        "t": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5),
        "slanted": torch.randn(4, 3, generator=draw).t(),
    }
    path = tmp_path / "x.safetensors"
    stored = [Stored.of(name, t) for name, t in tensors.items()]
    record = write_tensor_file(path, stored, {"format": "pt"})
    assert record == record_of(path)
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_runs_of_tensors_are_read_as_safetensors_reads_them(tmp_path):
    """The reader of slices against safetensors' own, on a file of each of the two writers."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.arange(11, dtype=torch.int64),
        "c": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"k": "v"})
    write_tensor_file(
        tmp_path / "ours", [Stored.of(n, t) for n, t in tensors.items()], metadata={"k": "v"}
    )
    for name in ("theirs", "ours"):
        path = tmp_path / name
        with TensorReader(path) as ours, safe_open(path, "pt") as theirs:
            assert ours.metadata == theirs.metadata() == {"k": "v"}
            assert sorted(ours.keys()) == sorted(theirs.keys())
            for key in ours.keys():  # noqa: SIM118 - a file is no dict
                whole = theirs.get_tensor(key).reshape(-1)
                assert ours.numel(key) == whole.numel()
                assert torch.equal(ours.read(key, 0, whole.numel()), whole)
                if whole.numel() < 3:
                    with pytest.raises(ValueError, match=f"{key} has {whole.numel()} elements"):
                        ours.read(key, 1, 3)
                else:
                    assert torch.equal(ours.read(key, 1, 3), whole[1:3])


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_file_cut_short_is_no_file_of_tensors(tmp_path, keep):
    write_tensor_file(tmp_path / "x", [Stored.of("a", torch.randn(9))])
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:keep])
    with pytest.raises((ValueError, OSError)):
        TensorReader(tmp_path / "x")


def test_a_large_write_is_hashed_like_a_small_one(tmp_path):
    """Chunks and partial writes must not show."""
    content = random.Random(0).randbytes(40 * 2**20 + 3)
    record = write_bytes(tmp_path / "x", content)
    assert record == record_of(tmp_path / "x")
    assert record.size == len(content)
    assert (tmp_path / "x").read_bytes() == content
