"""What one rank cannot tell the others is an error on all of them, and leaves none waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dstrain.core.errors import ConfigError, DataError, DstrainError, TrainingError


class OwnError(ConfigError):
    """An error of a plugin, whose lock cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("the plugin has no key")
        self.lock = threading.Lock()


class Unreadable:
    """Is pickled well, and cannot be read again."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def told_by(rank: int, act: Callable[[], object]) -> str:
    """Return the message of the user error in ``act``, which is the same on all ranks."""
    from dstrain.core.ranks import gather_objects

    with pytest.raises(DstrainError) as caught:
        act()
    told = gather_objects(str(caught.value))
    assert len(set(told)) == 1
    return told[0]


@pytest.mark.ranks(2, timeout=60)
@pytest.mark.parametrize("value", [threading.Lock(), Unreadable()], ids=["lock", "unreadable"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_value_that_cannot_be_sent_is_an_error_on_all_ranks(rank, culprit, value):
    from dstrain.core.ranks import broadcast_object, gather_objects

    mine = value if rank == culprit else 0
    assert f"a value of rank {culprit}" in told_by(rank, lambda: gather_objects(mine))
    if culprit == 0:
        assert "a value of rank 0" in told_by(rank, lambda: broadcast_object(mine))


@pytest.mark.ranks(2, timeout=60)
def test_an_answer_of_the_main_rank_that_cannot_be_sent_is_an_error_on_all_ranks(rank, world_size):
    from dstrain.core.ranks import Ranks, from_main

    ranks = Ranks(rank, rank, world_size, world_size)
    told = told_by(rank, lambda: from_main(ranks, threading.Lock))
    assert "cannot pickle '_thread.lock' object" in told


@pytest.mark.ranks(2, timeout=60)
def test_an_error_that_cannot_be_sent_is_raised_where_it_arose_and_told_elsewhere(rank, world_size):
    from dstrain.core.ranks import Ranks, all_or_none, from_main

    def fail() -> None:
        raise OwnError

    ranks = Ranks(rank, rank, world_size, world_size)
    with pytest.raises(OwnError if rank == 0 else TrainingError, match="the plugin has no key"):
        from_main(ranks, fail)

    def fail_on_one() -> None:
        with all_or_none():
            if rank == 1:
                fail()

    with pytest.raises(OwnError if rank == 1 else TrainingError, match="the plugin has no key"):
        fail_on_one()


@pytest.mark.ranks(2, timeout=120)
def test_predictions_that_cannot_be_sent_are_an_error_on_all_ranks(rank, tmp_path):
    from dstrain import Trainer
    from tests.distributed.runs import make_trainer

    class Odd(Trainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kept = [threading.Lock() if rank == 1 else 0 for _ in inputs["labels"]]
            return torch.tensor(1.0), kept, inputs["labels"]

    trainer = make_trainer(tmp_path, cls=Odd, eval_use_gather_object=True)
    trainer.compute_metrics = lambda _: {}
    with pytest.raises(DataError, match="objects cannot be sent to rank 0"):
        trainer.evaluate()
