"""What FP8 does to coefficients and gradients, on the CPU: Transformer Engine's Python, casts and sums in PyTorch.

    python tests/harness/te_fp8_report.py

Scales, histories and which tensors are quantized are Transformer Engine's own; a cast to FP8 is PyTorch's, a product
sums what was cast in float32. A GPU's kernels may sum otherwise. Writes benchmarks/results/fp8_on_cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
SIZES = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 1024, "vocab_size": 1024}
COLUMNS = ("coefficient_error", "gradient_cosine", "gradient_relative_error", "drift")


def main() -> int:
    """Measure, print and write down; fails where a score drifts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    import te_runtime
    from rank_pool import RankPool

    if (problem := te_runtime.problem()) is not None:
        print(problem, file=sys.stderr)
        return 1
    points: dict[str, list[dict[str, Any]]] = {}
    for call in (te_runtime.call, te_runtime.call_on_blackwell):
        pool = RankPool(1)
        (found,) = pool.run(1, call, "te_case", "suite_points", ("fp8-gradients", "fp8-curve"), SIZES, timeout=3600)
        pool.close()
        for name, own in found.items():
            first = name not in points
            points.setdefault(name, []).extend(p for p in own if "refused" not in p and (first or is_of_mxfp8(p)))
    from bench_output import write_text
    from record import machine

    facts = {**machine(), "transformer-engine": f"{te_runtime.version()}, kernels in PyTorch"}
    page = report(points, facts)
    write_text(args.output / "fp8_on_cpu.md", page)
    write_text(
        args.output / "fp8_on_cpu.json", json.dumps({"machine": facts, "sizes": SIZES, **points}, indent=1) + "\n"
    )
    print(page)
    every = [point for part in points.values() for point in part]
    return 1 if any(point.get("drift") or "error" in point for point in every) else 0


def is_of_mxfp8(point: dict[str, Any]) -> bool:
    """The recipe that is measured on its own."""
    return "mxfp8" in str(point.get("precision", point.get("run")))


def report(points: dict[str, list[dict[str, Any]]], facts: dict[str, str]) -> str:
    """The Markdown page."""
    sizes = ", ".join(f"{name} {value}" for name, value in SIZES.items())
    lines = [
        "# FP8 on the CPU",
        "",
        "`python tests/harness/te_fp8_report.py`: Transformer Engine's own modules and scaling state; casts to FP8",
        "and products (summed in float32) by PyTorch. Two groups of 8 responses of 32 tokens, beta 2 on mean scores,",
        f"no NLL. A model of {sizes}. No kernel of a GPU was run.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "Coefficient error: the largest difference of dL/dlogp over the largest dL/dlogp. Drift: scores of pass 2",
        "against those of pass 1.",
        "",
        "| precision | against | objective | coefficient error | gradient cosine | gradient relative error | drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points["fp8-gradients"]:
        if "objective" in point:
            values = ["none" if point[name] is None else f"{point[name]:.5g}" for name in COLUMNS]
            lines.append(f"| {point['precision']} | {point['against']} | {point['objective']} | {' | '.join(values)} |")
    lines += ["", "Loss curves, one batch again and again, mpo:", "", "| run | first | last | |", "|---|---|---|---|"]
    for point in points["fp8-curve"]:
        if "losses" in point:
            inside = {True: "inside bf16's spread", False: "OUTSIDE bf16's spread", None: ""}[point.get("inside")]
            lines.append(f"| {point['run']} | {point['first']:.4f} | {point['last']:.4f} | {inside} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
