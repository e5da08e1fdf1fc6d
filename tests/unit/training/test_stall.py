"""What is said of a run that stands still, from where its ranks say they stand."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from dstrain.core.ranks import Ranks
from dstrain.training import frames
from dstrain.training.place import Place
from dstrain.training.stall import StallWatch
from tests.launch import in_fresh_process

WAITS = {
    "step": 6, "in_step": True, "what": "micro-batch 1", "waits_in": "all_reduce", "line": "",
    "debugger": False, "gave_up": False, "goes_on": False,
}  # fmt: skip


def message(standings: dict[int, dict], world_size: int) -> str:
    loop = SimpleNamespace(place=Place(), progress=SimpleNamespace(step=6))
    watch = StallWatch(Ranks(0, 0, world_size, world_size), loop, timeout_seconds=60)
    return str(watch._error(standings))


def test_ranks_that_do_not_wait_are_the_missing_ones():
    late = WAITS | {"in_step": False, "what": "saving", "waits_in": "", "line": "x.py:3 in f"}
    told = message(dict.fromkeys(range(4096), WAITS) | {17: late}, 4096)
    assert "waited 60 s (ddp_timeout) for rank 17" in told
    assert "rank 17: after step 6, saving, at x.py:3 in f" in told
    assert "ranks 0-16, 18-4095: step 7, micro-batch 1, waits in all_reduce" in told
    assert len(told) < 2000


def test_ranks_that_do_not_answer_are_missing_too():
    told = message(dict.fromkeys(range(0, 64, 2), WAITS), 64)
    assert "for ranks 1, 3, 5" in told
    assert "has not answered" in told
    assert "and 16 more" in told


def test_ranks_a_step_behind_are_missing_where_all_wait():
    told = message({0: WAITS, 1: WAITS | {"step": 5}}, 2)
    assert "for rank 1\n" in told


def test_ranks_that_wait_for_each_other():
    told = message({0: WAITS, 1: WAITS | {"waits_in": "broadcast"}}, 2)
    assert "for each other, in different collectives" in told


def test_a_debugger_is_seen_in_the_frames():
    def standing() -> bool:
        return frames.is_debugged(sys._getframe())

    assert not standing()
    code = compile("found = standing()", "/usr/lib/python3.11/pdb.py", "exec")
    names = {"standing": standing}
    exec(code, names)
    assert names["found"]


@pytest.mark.parametrize("name", ["torch/distributed/distributed_c10d.py", "deepspeed/comm/x.py"])
def test_a_call_into_a_collective_is_told_from_a_users_code(name):
    entered, leave = threading.Event(), threading.Event()
    text = "def all_reduce():\n    entered.set()\n    leave.wait()\n"
    names = {"entered": entered, "leave": leave}
    exec(compile(text, f"{frames._LIBRARIES[1]}/{name}", "exec"), names)
    thread = threading.Thread(target=names["all_reduce"])
    thread.start()
    entered.wait()
    try:
        found = frames.collective_of(sys._current_frames()[thread.ident])
        assert found is not None
        assert found.f_code.co_name == "all_reduce"
    finally:
        leave.set()
        thread.join()
    assert frames.collective_of(sys._getframe()) is None


@pytest.mark.parametrize(("caller", "waits"), [("", True), ("user", False)])
def test_a_wait_for_a_collective_that_began_before_is_one(caller, waits):
    """Its frame is innermost then; a user's code that is called from there waits for itself."""
    seen: list[Any] = []
    text = "def answer(look):\n    return look()\n"
    names: dict[str, Any] = {}
    exec(compile(text, f"{frames._HOME}training/preemption.py", "exec"), names)
    names["answer"](lambda: seen.append(sys._getframe(0 if caller else 1)))
    assert (frames.collective_of(seen[0]) is not None) == waits


def called(chain: list[tuple[str, str]]) -> str:
    """Return the line that is told of the innermost of functions, each in a file, that call on."""
    inner: Any = lambda: frames.line_of(sys._getframe(1))  # noqa: E731
    for name, file in reversed(chain):
        names = {"inner": inner}
        exec(compile(f"def {name}():\n    return inner()\n", file, "exec"), names)
        inner = names[name]
    return str(inner())


LOOP, TORCH = (
    ("loop", f"{frames._HOME}training/loop.py"),
    ("call", f"{frames._LIBRARIES[1]}/torch/a.py"),
)
MAIN, TRAIN = ("main", "/me/script.py"), ("train", f"{frames._HOME}trainer/trainer.py")
LOSS, FORWARD = ("compute_loss", "/me/script.py"), ("forward", "/me/model.py")


@pytest.mark.parametrize(
    ("chain", "line"),
    [
        # What a user's main() calls is not where a rank stands.
        ([MAIN, TRAIN, LOOP], f"{LOOP[1]}:2 in loop"),
        ([MAIN, TRAIN, LOOP, TORCH], f"{TORCH[1]}:2 in call"),
        ([MAIN, TRAIN, LOOP, LOSS, TORCH], "/me/script.py:2 in compute_loss"),
        ([MAIN, TRAIN, LOSS, LOOP, TORCH, FORWARD, TORCH], "/me/model.py:2 in forward"),
        # An override that has called the method it overrides.
        ([MAIN, TRAIN, LOSS, LOOP, TORCH], "/me/script.py:2 in compute_loss"),
    ],
)
def test_the_line_is_of_what_training_calls(chain, line):
    # The frames of this test are no library's, as a user's script is not.
    assert called(chain) == line


def look_for_the_store_between_groups() -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    loop = SimpleNamespace(place=Place(), progress=SimpleNamespace(step=0))
    watch = StallWatch(Ranks(0, 0, 2, 2), loop, timeout_seconds=60)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with watch.watching():
        dist.destroy_process_group()
        assert watch._round(watch._connect()) == 0
        again = dist.PrefixStore("again", store)
        dist.init_process_group("gloo", store=again, rank=0, world_size=1)
        dist.PrefixStore("dstrain-stall", store).add("round", 1)
        assert watch._round(watch._connect()) == 1
    dist.destroy_process_group()


def test_ranks_find_the_store_where_there_is_no_group_for_a_while():
    """Between two groups, where memory ran out; it once ended a run that was to go on."""
    in_fresh_process(look_for_the_store_between_groups)
