"""The GPU suite's results as JSON, Markdown and a picture; every rate beside its limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_output import BLUE, GREEN, ORANGE, machine_lines, write_figure, write_text
from matplotlib.figure import Figure

GIB = 2**30
Outcome = dict[str, Any]
Point = dict[str, Any]


def write_report(folder: Path, outcomes: Sequence[Outcome], *, command: str) -> str:
    """Write gpu_suite.{json,md,png}; the page."""
    limits = rates_of(outcomes)
    page = markdown(outcomes, limits, command)
    write_text(
        folder / "gpu_suite.json", json.dumps({"command": command, "rates": limits, "parts": list(outcomes)}) + "\n"
    )
    write_text(folder / "gpu_suite.md", page)
    steps = [point for point in _points(outcomes) if "tokens_per_s" in point]
    if steps:
        write_figure(folder / "gpu_suite.png", figure(steps, limits))
    return page


def rates_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """FLOP/s of matrix products by precision, bytes/s of a copy: as the part ``rates`` measured them."""
    found: dict[str, float] = {}
    for point in next((outcome["points"] for outcome in outcomes if outcome["name"] == "rates"), ()):
        found[point["what"]] = point.get("flops_per_s") or point.get("bytes_per_s") or 0.0
    return found


def matmul_rate(point: Point, limits: dict[str, float]) -> float | None:
    """What the matrix products of this precision could run at."""
    kind = {"fp32": "float32", "bf16": "bfloat16"}.get(point["precision"], "float8_e4m3")
    return limits.get(f"matmul {kind}")


def least_seconds(point: Point, limits: dict[str, float]) -> float | None:
    """The step's matrix products at the measured rate, then its update's bytes at the measured copy rate.

    Forward recomputation is not in the FLOPs: it is work the limit does not need. In FP8 everything but the attention
    and the output layer could run at the FP8 rate; the limit takes all of it there, so it is a little too low.
    """
    rate, copy = matmul_rate(point, limits), limits.get("copy")
    if not rate or not copy or "flops" not in point:
        return None
    return point["flops"] / rate + point["optimizer_bytes"] / copy


def markdown(outcomes: Sequence[Outcome], limits: dict[str, float], command: str) -> str:
    lines = ["# The GPU suite", "", f"`{command}`", ""]
    lines += ["| part | state | seconds | points | error |", "|---|---|---:|---:|---|"]
    for outcome in outcomes:
        error = (outcome["error"] or "").strip().splitlines()[-1:] or [""]
        cells = [outcome["name"], outcome["state"], f"{outcome['seconds']:.0f}", str(len(outcome["points"]))]
        lines.append("| " + " | ".join([*cells, error[0][:160].replace("|", "\\|")]) + " |")
    lines += ["", *_rates_section(limits), *_tests_section(outcomes), *_steps_section(outcomes, limits)]
    lines += [*_gradients_section(outcomes), *_curves_section(outcomes)]
    for record in {json.dumps(outcome["machine"]): outcome["machine"] for outcome in outcomes}.values():
        lines += ["", *machine_lines(record)]
    return "\n".join(lines) + "\n"


def _rates_section(limits: dict[str, float]) -> list[str]:
    if not limits:
        return []
    lines = ["## Rates", "", "| what | rate |", "|---|---:|"]
    for what, rate in limits.items():
        unit = f"{rate / 1e12:.3g} TB/s, read and written" if what == "copy" else f"{rate / 1e12:.3g} TFLOP/s"
        lines.append(f"| {what} | {unit} |")
    return [*lines, ""]


def _tests_section(outcomes: Sequence[Outcome]) -> list[str]:
    found = [point for point in _points(outcomes) if "summary" in point or "laws" in point]
    lines = ["## Correctness", "", *(f"- pytest -m gpu: {p['summary']}" for p in found if "summary" in p)]
    lines += [f"- {law}" for point in found if "laws" in point for law in point["laws"]]
    return [*lines, ""] if found else []


def _steps_section(outcomes: Sequence[Outcome], limits: dict[str, float]) -> list[str]:
    lines = [
        "## Steps",
        "",
        "MFU: the step's FLOPs (forward, backward, scoring pass; real tokens; no recomputation) over its time and the "
        "measured rate of matrix products in its precision. Limit: those FLOPs at that rate and the update's bytes at "
        "the copy rate; of limit: its share of the measured time.",
        "",
        "| part | what | N | length | responses | ms | tokens/s | MFU | limit (ms) | of limit | peak (GiB) | scoring / "
        "coefficients / backward / optimizer (ms) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    found = False
    for outcome in outcomes:
        for point in outcome["points"]:
            if "precision" not in point or "objective" in point or "losses" in point or "run" in point:
                continue
            what = [str(point[key]) for key in ("what", "variant", "mode", "shape", "precision") if key in point]
            cells = [outcome["name"], ", ".join(what), str(point.get("group_size", "")), str(point.get("length", ""))]
            reason = [f"{key.replace('_', ' ')}: {point[key]}" for key in ("refused", "out_of_memory") if key in point]
            if "error" in point:
                reason = [f"error: {point['error'].strip().splitlines()[-1]}"]
            if reason:
                lines.append("| " + " | ".join([*cells, reason[0][:140].replace("|", "\\|")]) + " |" * 8)
                continue
            found = True
            lines.append("| " + " | ".join([*cells, *_step_cells(point, limits)]) + " |")
    return [*lines, ""] if found else []


def _step_cells(point: Point, limits: dict[str, float]) -> list[str]:
    seconds, rate, least = point["seconds"], matmul_rate(point, limits), least_seconds(point, limits)
    mfu = f"{point['flops'] / seconds / rate:.1%}" if rate and "flops" in point else ""
    limit = [f"{1000 * least:.3g}", f"{least / seconds:.1%}"] if least else ["", ""]
    names = ("scoring", "coefficients", "backward", "optimizer")
    split = [f"{point['split'].get(f'time/{name}_ms', 0.0):.3g}" for name in names] if "split" in point else []
    numbers = [str(point["num_responses"]), f"{1000 * seconds:.4g}", f"{point['tokens_per_s']:,.0f}", mfu, *limit]
    return [*numbers, f"{point['peak_bytes'] / GIB:.3g}", " / ".join(split)]


def _gradients_section(outcomes: Sequence[Outcome]) -> list[str]:
    points = [point for outcome in outcomes if outcome["name"] == "fp8-gradients" for point in outcome["points"]]
    if not points:
        return []
    lines = [
        "## What a precision does to the step",
        "",
        "Same batch and weights. Coefficient error: largest difference of a response's weight in pass 2, over the "
        "largest weight. Gradient: over the whole model.",
        "",
        "| precision | against | objective | coefficient error | gradient cosine | gradient relative error | drift |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for point in points:
        if "refused" in point or "error" in point:
            lines.append(f"| {point['precision']} | {(point.get('refused') or 'error')[:140]} | | | | | |")
            continue
        drift = "" if point["drift"] is None else f"{point['drift']:.2e}"
        numbers = f"{point['coefficient_error']:.2e} | {point['gradient_cosine']:.6f}"
        numbers += f" | {point['gradient_relative_error']:.2e} | {drift}"
        lines.append(f"| {point['precision']} | {point['against']} | {point['objective']} | {numbers} |")
    return [*lines, ""]


def _curves_section(outcomes: Sequence[Outcome]) -> list[str]:
    points = [point for outcome in outcomes if outcome["name"] == "fp8-curve" for point in outcome["points"]]
    if not points:
        return []
    lines = ["## Loss curves", "", "| run | first loss | last loss | inside bf16's spread |", "|---|---:|---:|---|"]
    for point in points:
        if "losses" not in point:
            lines.append(f"| {point['run']} | {(point.get('refused') or 'error')[:140]} | | |")
            continue
        verdict = {True: "yes", False: "NO", None: ""}[point.get("inside")]
        lines.append(f"| {point['run']} | {point['first']:.5f} | {point['last']:.5f} | {verdict} |")
    return [*lines, ""]


def figure(steps: Sequence[Point], limits: dict[str, float]) -> Figure:
    """Peak memory and tokens per second against N, and tokens per second against length."""
    picture = Figure(figsize=(12.6, 4.0), layout="constrained")
    memory, speed, length = picture.subplots(1, 3)
    series: dict[tuple[str, str, str], list[Point]] = {}
    for point in steps:
        if "mode" in point and "variant" not in point and "what" not in point:
            series.setdefault((point["shape"], point["precision"], point["mode"]), []).append(point)
    colours = {"decoupled": BLUE, "coupled": ORANGE}
    for (shape, precision, mode), points in series.items():
        colour = GREEN if precision.startswith("fp8") else colours[mode]
        style = {"color": colour, "linestyle": "-" if shape == "1b" else "--", "marker": "o", "markersize": 4}
        label = f"{shape}, {precision}, {'two passes' if mode == 'decoupled' else 'one graph'}"
        lengths = {point["length"] for point in points}
        by_size = {point["group_size"]: point for point in points if point["length"] == _usual(points)}
        sizes = sorted(by_size)
        memory.plot(sizes, [by_size[n]["peak_bytes"] / GIB for n in sizes], label=label, **style)
        speed.plot(sizes, [by_size[n]["tokens_per_s"] for n in sizes], label=label, **style)
        if len(lengths) > 1:
            swept = sorted((p["length"], p["tokens_per_s"]) for p in points if p["group_size"] == 4)
            length.plot([x for x, _ in swept], [y for _, y in swept], label=label, **style)
    for panel, name in ((memory, "peak GiB"), (speed, "tokens/s"), (length, "tokens/s, N = 4")):
        panel.set_ylabel(name, fontsize=9)
        panel.set_xlabel("length" if panel is length else "N, responses of a group", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
    handles, labels = memory.get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return picture


def _usual(points: Sequence[Point]) -> int:
    """The length most points have: that of the sweep over N."""
    lengths = [point["length"] for point in points]
    return max(set(lengths), key=lengths.count)


def _points(outcomes: Sequence[Outcome]) -> list[Point]:
    return [point for outcome in outcomes for point in outcome["points"]]
