"""Peak bytes allocated by tensors while a function runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocations:
    """What was allocated beyond what was there before."""

    peak: int
    """Bytes alive at a time."""
    largest: int
    """Bytes of the largest single allocation; 0 where it is not known (CUDA)."""


def allocations(work: Callable[[], Any], *, device: str = "cpu") -> Allocations:
    """Run ``work`` and count.

    On the CPU: every allocation and release of PyTorch's allocator, in order, from the profiler; that is exact for
    tensors, temporaries inside kernels included, and leaves out what a matrix library keeps for itself. On CUDA:
    ``max_memory_allocated`` of a second call, in units of 512 bytes.
    """
    if device == "cuda":
        work()  # libraries take their workspaces at first use, from the same allocator
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return Allocations(peak=torch.cuda.max_memory_allocated() - before, largest=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, that it forgets its events afterwards
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    result: Any = profiler.profiler
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = peak = largest = 0
    for event in events:
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return Allocations(peak=peak, largest=largest)
