"""Figures between two logs: the mean loss, the first bad step, and a speed of training alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from dstrain.training import metrics as meters
from dstrain.training.metrics import TrainMeter


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Give the clock of the meters."""
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


def feed(meter: TrainMeter, losses: Sequence[float], *, first_step: int = 1) -> None:
    for step, loss in enumerate(losses, start=first_step):
        meter.add([torch.tensor(loss)], [(1,)], 1, step=step, num_tokens=10)


def metered(losses: Sequence[float], *, filter_bad: bool = True) -> TrainMeter:
    meter = TrainMeter("cpu", filter_bad=filter_bad)
    feed(meter, losses)
    return meter


def test_loss_is_the_mean_over_steps():
    reading = metered([1.0, 2.0, 6.0]).read()
    assert reading.loss == pytest.approx(3.0)
    assert reading.loss_sum == pytest.approx(9.0)
    assert reading.num_steps == 3
    assert reading.num_tokens == 30
    assert reading.first_bad_step is None


def test_reading_begins_anew():
    """Catches a running mean over the whole run, or tokens counted in two logs."""
    meter = metered([1.0, 3.0])
    meter.read()
    feed(meter, [10.0], first_step=3)
    reading = meter.read()
    assert (reading.loss, reading.num_steps, reading.num_tokens) == (10.0, 1, 10)


def test_reading_without_a_step_is_zero_and_not_nan():
    """The last reading of a run adds to its totals, right after a log."""
    reading = metered([]).read()
    assert (reading.loss, reading.loss_sum, reading.num_steps, reading.num_tokens) == (0, 0, 0, 0)


def test_many_small_losses_keep_their_precision():
    reading = metered([0.1] * 500).read()
    assert reading.loss == pytest.approx(0.1, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [8, torch.tensor(8.0)])
def test_micro_batches_weigh_as_much_as_they_have_targets(dtype, total):
    """Of 8 targets over all ranks this one has 3 and 1; the total may still be on the device."""
    meter = TrainMeter("cpu", filter_bad=True)
    losses = [torch.tensor(2.0, dtype=dtype), torch.tensor([4.0], dtype=dtype)]
    meter.add(losses, [(3,), (1,)], total, step=1, num_tokens=10)
    empty = torch.tensor(math.nan)  # of a window without any target
    meter.add([empty], [(0,)], 0, step=2, num_tokens=0)
    reading = meter.read()
    assert reading.loss_sum == pytest.approx((2 * 3 + 4) / 8)
    assert (reading.num_steps, reading.first_bad_step) == (2, None)


def test_each_part_of_a_loss_is_weighted_by_its_own_targets():
    """A micro-batch with masked tokens and no sentence, and one with neither many nor few."""
    meter = TrainMeter("cpu", filter_bad=True)
    losses = [torch.tensor([2.0, math.nan]), torch.tensor([4.0, 1.0])]
    meter.add(losses, [(3, 0), (1, 2)], torch.tensor([8.0, 4.0]), step=1, num_tokens=10)
    assert meter.read().loss_sum == pytest.approx((2 * 3 + 4) / 8 + 1 * 2 / 4)


def test_sums_do_not_depend_on_when_they_are_read(monkeypatch):
    """A save reads them, and a run without that save must log the same loss to the last bit."""
    losses = torch.rand(50, generator=torch.Generator().manual_seed(1)).tolist()
    whole = metered(losses).read()
    often = TrainMeter("cpu", filter_bad=True)
    monkeypatch.setattr(meters, "_MOST_WINDOWS", 7)
    for step, loss in enumerate(losses, start=1):
        feed(often, [loss], first_step=step)
        if step % 5 == 0:
            often.state()
    assert often.read().loss == whole.loss


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_filter_leaves_bad_losses_out_of_the_mean_wherever_they_stand(bad, place):
    """Catches a bad loss that counts as 0, which would log a loss that is too low."""
    losses = [2.0, 4.0, 6.0]
    reading = metered([*losses[:place], bad, *losses[place:]]).read()
    assert reading.loss == pytest.approx(4.0)
    assert reading.num_steps == 4
    assert reading.loss_sum == pytest.approx(16.0), "the totals of the run divide by all steps"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_the_filter_bad_losses_show(bad):
    assert not math.isfinite(metered([1.0, bad, 1.0], filter_bad=False).read().loss)


def test_nothing_but_bad_losses_is_nan_and_not_zero():
    """A loss of 0.0 in a log would look like success."""
    assert math.isnan(metered([math.nan, math.inf]).read().loss)


def test_a_bad_window_does_not_reach_into_the_next():
    meter = metered([math.nan])
    meter.read()
    feed(meter, [5.0], first_step=2)
    reading = meter.read()
    assert reading.loss == 5.0
    assert reading.first_bad_step is None


@pytest.mark.parametrize("filter_bad", [True, False])
def test_the_first_bad_step_is_found_with_and_without_the_filter(filter_bad):
    """The filter is about the log; the run must still be able to stop."""
    losses = [1.0, 1.0, math.nan, 1.0, math.inf]
    assert metered(losses, filter_bad=filter_bad).read().first_bad_step == 3


def test_the_number_of_a_step_is_the_runs_and_not_the_windows():
    meter = metered([1.0] * 5)
    meter.read()
    feed(meter, [1.0, math.nan], first_step=6)
    assert meter.read().first_bad_step == 7


def test_adding_does_not_wait_for_the_device(monkeypatch):
    """On a GPU each of these calls would stall the step."""
    meter = TrainMeter("cpu", filter_bad=True)

    def wait(*args: object) -> None:
        raise AssertionError("a wait for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    feed(meter, [1.0, math.nan])


# --- over ranks ----------------------------------------------------------------------------------


def test_shares_of_all_ranks_add_up_and_tokens_too(monkeypatch):
    """Each rank has its share of the global mean; a mean over ranks would be too low by their
    number."""
    other = metered([0.5, 1.5])
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(meters, "sum_over_ranks", lambda t: (sent.append(t.clone()), t)[1])
    other.read()
    monkeypatch.setattr(meters, "sum_over_ranks", lambda t: t + sent[0])
    reading = metered([1.0, 2.0]).read()
    assert reading.loss == pytest.approx((1.5 + 3.5) / 2)
    assert reading.num_tokens == 40


def test_the_first_bad_step_is_that_of_any_rank(monkeypatch):
    """The NaN may be in the data of another rank."""
    monkeypatch.setattr(meters, "sum_over_ranks", lambda t: t + torch.tensor([0.0, 1.0, 0.0]))
    monkeypatch.setattr(
        "dstrain.core.ranks.gather_objects",
        lambda own: [own, (4, {"b"}), (-1, {"c"}), (2, {"two", "one"})],
        raising=True,
    )
    reading = metered([1.0, 1.0, math.nan]).read()
    assert reading.first_bad_step == 2
    assert reading.empty_columns == ("one", "two")


# --- speed ---------------------------------------------------------------------------------------


def test_seconds_are_those_since_the_last_reading(clock):
    meter = TrainMeter("cpu", filter_bad=True)
    clock.now += 5
    assert meter.read().seconds == 5
    clock.now += 2
    assert meter.read().seconds == 2


def test_time_of_an_evaluation_is_not_training_time(clock):
    """Otherwise tokens per second would drop after every evaluation."""
    meter = TrainMeter("cpu", filter_bad=True)
    clock.now += 3
    meter.exclude(2)
    clock.now += 1
    assert meter.read().seconds == 2
    clock.now += 4
    assert meter.read().seconds == 4, "excluded once, not for ever"


# --- taken up from a checkpoint ------------------------------------------------------------------


def test_a_restored_meter_reads_what_the_saved_one_would_have(clock):
    """Exactly, and the time of the interruption is no training time."""
    saved = metered([0.1, 0.7, math.inf])
    clock.now += 2.0
    state = saved.state()
    clock.now += 1000.0
    restored = TrainMeter("cpu", filter_bad=True)
    restored.restore([state], rank=0, world_size=1)
    clock.now += 3.0
    feed(restored, [0.3], first_step=4)
    reading = restored.read()
    whole = metered([0.1, 0.7, math.inf, 0.3]).read()
    assert (reading.loss, reading.loss_sum, reading.first_bad_step) == (
        whole.loss,
        whole.loss_sum,
        whole.first_bad_step,
    )
    assert reading.num_tokens == 40
    assert reading.seconds == pytest.approx(5.0)


@pytest.mark.parametrize("filter_bad", [True, False])
def test_other_ranks_take_over_the_sum_of_all(filter_bad):
    """Two ranks' shares of the loss, read by one."""
    parts = [[0.2, 0.4], [0.6, math.nan if filter_bad else 0.8]]
    states = [metered(part, filter_bad=filter_bad).state() for part in parts]
    meter = TrainMeter("cpu", filter_bad=filter_bad)
    meter.restore(states, rank=0, world_size=1)
    reading = meter.read()
    # Each rank's mean is over the losses that count there.
    assert reading.loss == pytest.approx(0.3 + (0.6 if filter_bad else 0.7))
    assert reading.num_steps == 2
    assert reading.num_tokens == 40
    assert reading.first_bad_step == (2 if filter_bad else None)
    other = TrainMeter("cpu", filter_bad=filter_bad)
    other.restore(states, rank=1, world_size=3)
    assert other.state()["loss"] == 0.0
    assert other.state()["tokens"] == 0
    assert other.read().num_steps == 2
