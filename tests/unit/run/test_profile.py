"""--profile writes a trace of the iterations that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_groupdpo.config import LoggingConfig
from megatron_groupdpo.run.logs.profile import StepProfiler


def run(folder: Path | None, options: LoggingConfig, iterations: range) -> list[Path]:
    traces = []
    with StepProfiler(options, folder, rank=3) as profiler:
        for iteration in iterations:
            profiler.before(iteration)
            with torch.profiler.record_function(f"iteration {iteration}"):
                torch.ones(4).sum()
            if (trace := profiler.after(iteration)) is not None:
                traces.append(trace)
    return traces


def names(trace: Path) -> set[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("iteration ")}


def test_the_trace_holds_the_iterations_of_the_window_and_no_others(tmp_path: Path):
    options = LoggingConfig(profile=True, profile_step_start=2, profile_step_end=4)
    (trace,) = run(tmp_path, options, range(1, 6))
    assert trace == tmp_path / "profile" / "rank3_iterations_2_to_3.json"
    assert names(trace) == {"iteration 2", "iteration 3"}
    assert [path.name for path in (tmp_path / "profile").iterdir()] == [trace.name]  # nothing half-written


def test_a_run_resumed_inside_the_window_traces_the_rest_of_it(tmp_path: Path):
    options = LoggingConfig(profile=True, profile_step_start=2, profile_step_end=5)
    (trace,) = run(tmp_path, options, range(3, 6))
    assert names(trace) == {"iteration 3", "iteration 4"}


def test_nothing_is_traced_unless_asked_for(tmp_path: Path):
    assert run(tmp_path, LoggingConfig(profile_step_start=1, profile_step_end=2), range(1, 3)) == []
    assert run(None, LoggingConfig(profile=True, profile_step_start=1, profile_step_end=2), range(1, 3)) == []
    assert not (tmp_path / "profile").exists()
