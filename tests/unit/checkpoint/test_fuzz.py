"""Checkpoints damaged at random: each verifies, falls back, or is one error."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time

import pytest

from dstrain.checkpoint import (
    compare,
    convert,
    export,
)
from dstrain.checkpoint.manifest import NAME
from dstrain.core.errors import CheckpointError
from tests.unit.checkpoint.forged import (
    FUZZ_CASES,
    names_in,
    resumed,
    seal,
    spoil,
    whole,
    with_pickle,
)


@pytest.mark.parametrize("seed", range(6))
def test_a_seeded_fuzz_verifies_falls_back_or_gives_one_error(tmp_path, seed):
    """Nothing is executed, hangs, or is written outside; 600 cases in all."""
    run, out = tmp_path / "run", tmp_path / "out"
    older, folder = whole(run, 2), whole(run, 4)
    kept = shutil.copytree(folder, tmp_path / "kept")
    marker = tmp_path / "marker"
    good = 0
    for case in range(FUZZ_CASES // 6):
        draw = random.Random(seed * 10_000 + case)
        if draw.random() < 0.1:
            with_pickle(folder, marker, draw.choice(["deepspeed", "slices", "x"]))
        name = spoil(folder, draw)
        before, start = names_in(tmp_path), time.monotonic()
        told = f"seed {seed}, case {case}: {name}"
        try:
            chosen = resumed(run)
        except Exception as error:
            raise AssertionError(told) from error
        assert chosen in (older.name, folder.name), told
        good += chosen == folder.name
        for act in (
            lambda: export(folder, out),
            lambda: convert(folder, out),
            lambda: compare(older, folder) and None,
        ):
            try:
                act()
            except CheckpointError as error:
                assert len(error.problems) == 1, told  # noqa: PT017
                assert not out.exists(), told
            except Exception as error:
                raise AssertionError(told) from error
            shutil.rmtree(out, ignore_errors=True)
        assert time.monotonic() - start < 10, told
        assert not marker.exists(), told
        assert names_in(tmp_path) == before, told
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert 0 < good < FUZZ_CASES // 6


def test_the_fuzz_can_tell(folder):
    """What is put back is whole: failures above are of what was spoilt."""
    before = copy.deepcopy(json.loads((folder / NAME).read_bytes()))
    seal(folder)
    assert json.loads((folder / NAME).read_bytes()) == before
