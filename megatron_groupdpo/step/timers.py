"""Where the time of a step goes, without the host waiting for the device: CUDA events, read once the step is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "reference", "scoring", "coefficients", "backward", "optimizer")
"""In the order of the step."""


class StepTimers:
    """Milliseconds by part of the step; use as ``with timers("scoring"): ...``.

    On a GPU a part's time is between two events in the current stream, so parts that the host queues without waiting
    are told apart; ``data`` is the host's time, in which nothing may be queued. Elsewhere it is the host's time.
    """

    def __init__(self, device: torch.device, *, on: bool = True) -> None:
        self._on_cuda = device.type == "cuda"
        self._on = on
        self._host_ms: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the body to ``part``."""
        assert part in PARTS, part
        if not self._on:
            yield
        elif self._on_cuda and part != "data":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            started = time.perf_counter()
            yield
            self._host_ms[part] = self._host_ms.get(part, 0.0) + 1000 * (time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        """``{"time/scoring_ms": ...}`` since the last call; waits until the device has come this far."""
        total = dict(self._host_ms)
        for part, start, end in self._events:
            end.synchronize()
            total[part] = total.get(part, 0.0) + start.elapsed_time(end)
        self._host_ms, self._events = {}, []
        return {f"time/{part}_ms": total[part] for part in PARTS if part in total}


NO_TIMERS = StepTimers(torch.device("cpu"), on=False)
"""Measures nothing."""
