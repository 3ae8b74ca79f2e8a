"""Time by part of the step."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_groupdpo.step.timers import NO_TIMERS, StepTimers

CPU = torch.device("cpu")


def test_times_add_up_by_part_and_start_anew_after_a_reading():
    timers = StepTimers(CPU)
    for _ in range(2):
        with timers("scoring"):
            time.sleep(0.02)
    with timers("data"):
        pass
    found = timers.read()
    assert list(found) == ["time/data_ms", "time/scoring_ms"]
    assert 40 <= found["time/scoring_ms"] < 2000
    assert found["time/data_ms"] < 20
    assert timers.read() == {}


def test_a_part_without_a_name_is_a_mistake_and_off_measures_nothing():
    with pytest.raises(AssertionError, match="lunch"), StepTimers(CPU)("lunch"):
        pass
    with NO_TIMERS("scoring"):
        pass
    assert NO_TIMERS.read() == {}


class Event:
    """A CUDA event on a stream whose clock is ``now``, read only once it is over."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at, self.is_over = -1.0, False

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        self.is_over = True

    def elapsed_time(self, end: Event) -> float:
        assert end.is_over
        return end.at - self.at


def test_on_a_gpu_parts_are_timed_between_events_of_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timers = StepTimers(torch.device("cuda"))
    for part, milliseconds in (("scoring", 3.0), ("backward", 7.0), ("scoring", 4.0), ("data", 1000.0)):
        with timers(part):
            Event.now += milliseconds
    found = timers.read()
    assert list(found) == ["time/data_ms", "time/scoring_ms", "time/backward_ms"]
    assert (found["time/scoring_ms"], found["time/backward_ms"]) == (7.0, 7.0)
    assert found["time/data_ms"] < 500, "of the host, in which the stream's time is nothing"
    assert timers.read() == {}


@pytest.mark.gpu
def test_events_time_what_the_host_does_not_wait_for():
    device = torch.device("cuda", 0)
    matrix = torch.randn(8192, 8192, device=device)
    timers, started = StepTimers(device), time.perf_counter()
    with timers("backward"):
        for _ in range(20):
            matrix = matrix @ matrix.t() / 8192
    queued_ms = 1000 * (time.perf_counter() - started)
    found = timers.read()
    assert found["time/backward_ms"] > 20
    assert found["time/backward_ms"] > queued_ms  # the host was done before
