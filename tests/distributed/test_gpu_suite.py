"""The GPU suite's own code, on the CPU and on toy sizes: only the kernels are left to see on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_report import least_seconds, write_report
from gpu_suite import DONE, FAILED
from rank_pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
IN_ONE_PROCESS = ("rates", "groups-1b-bf16", "groups-1b-fp8", "variants-1b", "lengths-1b", "fp8-gradients", "fp8-curve")


def points_of(names: tuple[str, ...], output: str) -> dict[str, list[dict[str, Any]]]:
    from gpu_context import Context
    from gpu_parts import PARTS

    context = Context(device="cpu", tiny=True, output=Path(output))
    return {name: list(PARTS[name].run(context)) for name in names}


@pytest.fixture(scope="module")
def measured(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    (points,) = pool.run(1, points_of, IN_ONE_PROCESS, str(tmp_path_factory.mktemp("suite")), timeout=400)
    return points


@pytest.mark.costly
def test_every_part_measures_or_says_why_not(measured: dict[str, list[dict[str, Any]]]):
    errors = [point["error"] for points in measured.values() for point in points if "error" in point]
    assert errors == []
    refused = {point["refused"] for points in measured.values() for point in points if "refused" in point}
    assert refused == {
        "needs Transformer Engine, and the device is the CPU",
        "CUDA graphs need a GPU, and the device is the CPU",
    }
    assert [p["what"] for p in measured["rates"]] == [
        "matmul bfloat16",
        "matmul float32",
        "matmul float8_e4m3",
        "copy",
    ]
    steps = measured["groups-1b-bf16"]
    assert [(p["mode"], p["group_size"]) for p in steps] == [(m, n) for m in ("decoupled", "coupled") for n in (2, 4)]
    for point in steps:
        assert point["length"] == 32
        # Parts of a step are within the step.
        assert 0 < sum(point["split"].values()) <= 1050 * point["seconds"]
        assert ("time/scoring_ms" in point["split"]) == (point["mode"] == "decoupled")
    decoupled, coupled = steps[0], steps[2]
    assert decoupled["flops"] == pytest.approx(coupled["flops"] * 4 / 3)


@pytest.mark.costly
def test_bf16_is_measured_against_fp32_on_equal_weights(measured: dict[str, list[dict[str, Any]]]):
    rows = [point for point in measured["fp8-gradients"] if "objective" in point]
    assert {(row["precision"], row["against"]) for row in rows} == {("bf16", "fp32")}
    for row in rows:
        assert 1e-6 < row["gradient_relative_error"] < 0.1
        assert row["gradient_cosine"] == pytest.approx(1.0, abs=0.01)
        assert row["coefficient_error"] < 0.1
    curves = [point["losses"] for point in measured["fp8-curve"] if "losses" in point]
    assert len(curves) == 3
    assert all(losses[-1] < losses[0] for losses in curves)


@pytest.mark.costly
def test_the_report_holds_every_part(measured: dict[str, list[dict[str, Any]]], tmp_path: Path):
    outcomes = [
        {"name": name, "state": DONE, "seconds": 1.0, "error": None, "machine": {"date": "today"}, "points": points}
        for name, points in measured.items()
    ]
    page = write_report(tmp_path, outcomes, command="the command")
    assert (tmp_path / "gpu_suite.md").read_text() == page
    assert (tmp_path / "gpu_suite.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]) == len(measured)
    for name in ("## Rates", "## Steps", "## What a precision does to the step", "## Loss curves", *measured):
        assert name in page


def test_the_limit_is_the_products_at_their_rate_and_the_updates_bytes():
    point = {"precision": "bf16", "flops": 6e12, "optimizer_bytes": 4e9}
    assert least_seconds(point, {"matmul bfloat16": 3e12, "copy": 2e9}) == 2.0 + 2.0
    assert least_seconds(point, {"copy": 2e9}) is None


def suite(output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benchmarks" / "gpu_suite.sh"), "--device", "cpu", "--scale", "tiny"]
    given = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command, "--output", str(output), *arguments], env=given, capture_output=True, text=True)


def outcome(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / "gpu_suite_parts" / f"{name}.json").read_text())


SLOW_PART = """import sys, time
if sys.orig_argv[2:4] == ["--run-part", "groups-1b-bf16"]:
    time.sleep(100)
"""
"""Read by every Python that starts with it on its path."""


@pytest.mark.costly
def test_a_part_is_done_once_and_a_failed_one_again(tmp_path: Path):
    first = suite(tmp_path, "--parts", "rates")
    assert first.returncode == 0, first.stderr
    found = outcome(tmp_path, "rates")
    assert (found["state"], len(found["points"]), found["error"]) == (DONE, 4, None)
    # A part that takes too long is ended and recorded; the one after it is still looked at.
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW_PART)
    started = time.monotonic()
    arguments = ("--parts", "groups-1b-bf16", "rates", "--budget-minutes", "0.17")
    second = suite(tmp_path, *arguments, PYTHONPATH=str(slow))
    assert time.monotonic() - started < 60
    assert second.returncode == 1
    assert "rates: done before" in second.stdout
    assert "not done: groups-1b-bf16 (failed)" in second.stderr
    found = outcome(tmp_path, "groups-1b-bf16")
    assert found["state"] == FAILED
    assert "it was ended after its limit of 10 s" in found["error"]
    assert "| groups-1b-bf16 | failed |" in (tmp_path / "gpu_suite.md").read_text()


def test_wrong_words_are_refused_with_the_right_ones(tmp_path: Path):
    answer = suite(tmp_path, "--parts", "rate")
    assert answer.returncode != 0
    assert "no part 'rate'; the parts are: tests, rates, groups-1b-bf16" in answer.stderr


@pytest.mark.slow
def test_the_whole_suite_runs_on_the_cpu(tmp_path: Path):
    pytest.importorskip("trl", reason="its comparison needs TRL: make setup EXTRAS=dev,bench")
    answer = suite(tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "| trl-1b | done |" in (tmp_path / "gpu_suite.md").read_text()
