"""What is said of ranks that run different software."""

from __future__ import annotations

import re

import pytest

from dstrain import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.core.ranks import named_ranks
from dstrain.core.versions import COMPARED, different_versions, installed, source_digest


def test_equal_versions_are_no_problem():
    """The usual case."""
    own = dict(installed(COMPARED))
    assert set(own) == set(COMPARED)
    assert different_versions([("a", own), ("a", own), ("b", own)]) == []
    assert re.fullmatch("[0-9a-f]{8}", source_digest())


def test_equal_ranks_are_one_group():
    """Each version once, with its ranks in runs and its hosts; every package that differs."""
    said = [
        (f"host-{rank // 4}", {"torch": "2.14" if rank < 12 else "2.15", "dstrain": "1"})
        for rank in range(24)
    ]
    said[3] = ("host-0", {"torch": "2.15"})
    torch, dstrain = map(str, different_versions(said))
    assert "torch is not the same on all ranks" in torch
    assert "2.14 on ranks 0-2, 4-11 (host-0, host-1, host-2)" in torch
    assert "2.15 on ranks 3, 12-23 (host-0, host-3, host-4, host-5)" in torch
    assert "missing on rank 3 (host-0)" in dstrain


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_output_dir_that_names_nothing_is_refused(empty):
    """It would be the current folder."""
    with pytest.raises(ConfigError, match="names none"):
        TrainingArguments(empty)
    assert TrainingArguments(None).output_dir == "trainer_output"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([0, *range(2, 4096)], "ranks 0, 2-4095"),
        ([0, 2, 4, 5, 9], "ranks 0, 2, 4-5, 9"),
    ],
)
def test_runs_of_ranks_are_shortened(ranks, words):
    """A message about a thousand ranks is one line."""
    assert named_ranks(ranks) == words
