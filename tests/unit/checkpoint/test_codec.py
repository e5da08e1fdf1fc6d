"""Values as JSON and back."""

from __future__ import annotations

import collections
import json
import math
import random

import numpy as np
import pytest
import torch

from dstrain.checkpoint.codec import decode, encode
from dstrain.core.errors import CheckpointError
from dstrain.core.seeds import random_state, set_random_state


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], "b": {"c": ()}},
        (1, (2, [3, (4,)])),
        {1: "one", (2, 3): [4]},
        collections.Counter({5: 1, 30: 2}),
        {"__tuple__": "a dict that looks like one of ours"},
        b"\x00\xff",
        0.1 + 0.2,
        -math.inf,
    ],
)
def test_values_come_back_as_they_were(value):
    """Through real JSON, with their types."""
    back = decode(json.loads(json.dumps(encode(value, where="x"), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)


def test_nan_and_tensors_come_back(tmp_path):
    """Both are unequal to themselves or compare element by element."""
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, where="x")))))
    for tensor in (torch.randn(3, 2).bfloat16(), torch.empty(0), torch.tensor(7)):
        back = decode(json.loads(json.dumps(encode(tensor, where="x"))))
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)


def test_what_would_need_a_pickle_is_refused_with_its_place():
    """Schedules can hold functions."""
    with pytest.raises(CheckpointError, match=r"schedule\.lambdas\[1\] is a function"):
        encode({"lambdas": [None, lambda: 0]}, where="schedule")


def test_random_states_come_back():
    """Of all three generators, in the middle of numpy's pair of normal numbers."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    draw()
    state = decode(json.loads(json.dumps(encode(random_state(), where="x"))))
    expected = draw(), draw()
    set_random_state(state)
    assert (draw(), draw()) == expected
