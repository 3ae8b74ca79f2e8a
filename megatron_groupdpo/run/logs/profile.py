"""--profile: a torch.profiler trace of chosen iterations, one file a rank, for chrome://tracing or Perfetto."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_groupdpo.config import LoggingConfig


class StepProfiler:
    """Traces iterations ``[profile_step_start, profile_step_end)``; a context manager around the loop.

    Args:
        options: the logging section.
        folder: of the run; traces go to ``profile/`` in it. None: nothing is traced.
        rank: in the file's name.
    """

    def __init__(self, options: LoggingConfig, folder: Path | None, *, rank: int) -> None:
        self._first, self._end = options.profile_step_start, options.profile_step_end
        self._folder = folder / "profile" if folder is not None and options.profile else None
        self._rank = rank
        self._running: profile | None = None
        self._since = 0

    def before(self, iteration: int) -> None:
        """Iteration ``iteration``, counted from 1, is about to run."""
        # A resumed run may start inside the window: what is left of it is traced.
        if self._folder is not None and self._running is None and self._first <= iteration < self._end:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running, self._since = profile(activities=activities, record_shapes=True), iteration
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the profiler, that it forgets its events afterwards
                self._running.__enter__()

    def after(self, iteration: int) -> Path | None:
        """It has run; the trace, if it was the last one of the window."""
        if self._running is None or self._folder is None or iteration != self._end - 1:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was queued belongs to the trace
        running = self._stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}_iterations_{self._since}_to_{iteration}.json"
        partial = path.with_suffix(".part")
        running.export_chrome_trace(str(partial))
        os.replace(partial, path)
        return path

    def _stop(self) -> profile:
        assert self._running is not None
        running, self._running = self._running, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running.__exit__(None, None, None)
        return running

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:  # the run ends inside the window, by an error
            self._stop()
