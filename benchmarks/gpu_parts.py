"""The parts of the GPU suite. A part yields points (plain dictionaries) as they are measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu_context import Context, Point
from record import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part."""

    about: str
    limit_s: int
    run: Callable[[Context], Iterator[Point]]


def tests(context: Context) -> Iterator[Point]:
    """``pytest -m gpu``: without a GPU they are collected and skipped, which tests the collection."""
    places = ["tests/unit/step/test_timers.py"] if context.tiny else ["tests"]
    arguments = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=--strict-markers -q", "-rs", *places]
    arguments += ["-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = ran.stdout.strip().splitlines()
    yield {"summary": lines[-1] if lines else "", "exit_code": ran.returncode, "output": ran.stdout[-6000:]}
    if ran.returncode:
        raise RuntimeError(f"pytest -m gpu ended with code {ran.returncode}:\n{ran.stdout[-4000:]}{ran.stderr[-2000:]}")


def memory(context: Context) -> Iterator[Point]:
    """benchmarks/memory_vs_group_size.py on this device, with its own result files."""
    sizes = ["--pipelines", "1", "--num-groups", "2", "--device", context.device, "--output", str(context.output)]
    sizes += context.pick(
        ["--bf16", "--hidden-size", "1024", "--vocab-size", "32000", "--lengths", "256", "1024"],
        ["--lengths", "16", "--group-sizes", "2", "4", "--num-layers", "2", "--vocab-size", "128"],
    )
    ran = subprocess.run(
        [sys.executable, "benchmarks/memory_vs_group_size.py", *sizes], cwd=ROOT, capture_output=True, text=True
    )
    laws = [line.removeprefix("- ") for line in ran.stdout.splitlines() if "holds" in line or "BROKEN" in line]
    yield {"laws": laws, "exit_code": ran.returncode}
    if ran.returncode:
        raise RuntimeError((ran.stdout + ran.stderr)[-4000:])


def rates(context: Context) -> Iterator[Point]:
    from gpu_rates import measure_rates

    yield from measure_rates(context)


def variants(context: Context) -> Iterator[Point]:
    from gpu_step import sweep_variants

    yield from sweep_variants(context)


def groups(shape: str, precision: str) -> Callable[[Context], Iterator[Point]]:
    def run(context: Context) -> Iterator[Point]:
        from gpu_step import sweep_groups

        yield from sweep_groups(context, shape, precision)

    return run


def lengths(context: Context) -> Iterator[Point]:
    from gpu_step import sweep_lengths

    yield from sweep_lengths(context)


def trl(context: Context) -> Iterator[Point]:
    from gpu_trl import measure_trl

    yield from measure_trl(context)


def fp8_gradients(context: Context) -> Iterator[Point]:
    from gpu_fp8 import compare_recipes

    yield from compare_recipes(context)


def fp8_curve(context: Context) -> Iterator[Point]:
    from gpu_fp8 import compare_curves

    yield from compare_curves(context)


PARTS: dict[str, Part] = {
    "tests": Part(about="pytest -m gpu", limit_s=300, run=tests),
    "rates": Part(about="matrix products and copies: what the rest is held against", limit_s=60, run=rates),
    "groups-1b-bf16": Part(
        about="1B shape, 2k tokens, N = 2 to 64: two passes and one graph", limit_s=200, run=groups("1b", "bf16")
    ),
    "fp8-gradients": Part(
        about="coefficients and gradients by recipe and objective, against fp32", limit_s=120, run=fp8_gradients
    ),
    "fp8-curve": Part(about="loss curves: FP8 recipes inside bf16's spread over seeds", limit_s=120, run=fp8_curve),
    "trl-1b": Part(about="TRL's DPOTrainer at N = 2 and the same pairs here", limit_s=120, run=trl),
    "groups-1b-fp8": Part(
        about="as groups-1b-bf16, FP8 tensorwise, two passes", limit_s=150, run=groups("1b", "fp8-tensorwise")
    ),
    "variants-1b": Part(
        about="local and TE layers, fused and plain log-probs, packed, CUDA graphs, FP8 recipes",
        limit_s=180,
        run=variants,
    ),
    "lengths-1b": Part(about="1B shape, N = 4, 1k to 8k tokens, bf16 and FP8", limit_s=150, run=lengths),
    "groups-7b-bf16": Part(about="7B shape, 2k tokens, N = 2 and 8", limit_s=150, run=groups("7b", "bf16")),
    "groups-7b-fp8": Part(about="the same, FP8 tensorwise", limit_s=150, run=groups("7b", "fp8-tensorwise")),
    "memory": Part(about="memory_vs_group_size.py", limit_s=120, run=memory),
}
"""In the order they run: what everything else is judged by first."""


def in_words(point: Point) -> str:
    """A line of the console."""
    parts = []
    for name, value in point.items():
        if isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif not isinstance(value, dict | list) and len(str(value)) < 100:
            parts.append(f"{name} {value}")
    return ", ".join(parts)
