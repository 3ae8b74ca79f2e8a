"""A run with --profile leaves its trace beside its metrics, and says where every iteration's time went."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rank_pool import RankPool
from tiny_run import output_on_rank, read_metrics

PARTS = ("data", "reference", "scoring", "coefficients", "backward", "optimizer")


def test_a_run_traces_the_iterations_that_were_asked_for(
    pool: RankPool, config_file: Callable[..., Path], tmp_path: Path
):
    save = tmp_path / "run"
    config = config_file(
        checkpoint={"save": str(save)},
        logging={"profile": True, "profile_step_start": 2, "profile_step_end": 4},
    )
    (printed,) = pool.run(1, output_on_rank, ["--config", str(config)])
    trace = save / "profile" / "rank0_iterations_2_to_3.json"
    assert f"profile: {trace}" in printed
    steps = [e for e in json.loads(trace.read_text())["traceEvents"] if str(e.get("name")).startswith("Optimizer.step")]
    assert len(steps) == 2
    for line in read_metrics(save):
        parts = [line[f"time/{part}_ms"] for part in PARTS]
        assert all(part >= 0 for part in parts)
        assert 0.2 * line["iteration_ms"] < sum(parts) <= line["iteration_ms"]
    assert "scoring (ms): " in printed
    assert "backward (ms): " in printed
