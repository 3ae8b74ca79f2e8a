"""One picture of a run, from its ``metrics.jsonl``.

Imports matplotlib's figure alone, not pyplot: no display, no global state, nothing to close.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_groupdpo.errors import DataError

# Okabe and Ito's colours: told apart with any colour vision, and in print.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_SMOOTH_FROM = 40
"""Points from which on a running mean is drawn over the raw line."""
_COLUMNS = 3

Curve = tuple[np.ndarray, np.ndarray]
"""Iterations and values, both [n] float64, n >= 1, iterations rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One set of axes: metric names with their label and colour."""

    title: str
    series: tuple[tuple[str, str, str], ...]
    """``(metric, label, colour)``; drawn where the run has it, and dashed with dots its ``eval/`` companion."""
    unit: str = ""
    log: bool = False
    """Dots on a logarithmic axis, without a mean: for values that spread over powers of ten."""
    level: float | None = None
    """A value worth a line across, such as chance."""
    right: tuple[str, str] | None = None
    """``(metric, label)`` of a schedule drawn against an axis of its own on the right."""


PANELS = (
    Panel(
        title="loss",
        series=(
            ("loss", "total", _BLUE),
            ("preference_loss", "preference", _ORANGE),
            ("nll_loss", "NLL of positives", _GREEN),
        ),
    ),
    Panel(title="reward margin", series=(("rewards/margins", "positives - negatives", _BLUE),), level=0.0),
    Panel(title="accuracy", series=(("rewards/accuracies", "pairs in order", _BLUE),), unit="share", level=0.5),
    Panel(
        title="log-probability of a response",
        series=(("logps/chosen", "positives", _BLUE), ("logps/rejected", "negatives", _ORANGE)),
        unit="nats",
    ),
    Panel(
        title="gradient norm (before clipping)",
        series=(("grad_norm", "gradient norm", _BLUE),),
        right=("lr", "learning rate"),
    ),
    Panel(title="score drift, pass 2 against pass 1", series=(("score_drift", "largest", _BLUE),), log=True),
)


def read_metrics(path: Path) -> dict[str, Curve]:
    """The curves of a run, by metric; non-numbers and NaN are left out.

    An iteration written twice counts as last written. A last line cut short is skipped: the run may be writing it.

    Args:
        path: a ``metrics.jsonl``: one object a line with ``iteration`` and metrics.

    Raises:
        DataError: the file is absent, holds a broken line before the last, or no metric at all.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a run's folder or its metrics.jsonl"
        ) from error
    points: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            iteration = float(record["iteration"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}:{number}: not an object with 'iteration'; each line of a run's log is one"
            ) from error
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                points.setdefault(name, {})[iteration] = float(value)
    points.pop("iteration", None)
    if not points:
        raise DataError(f"{path}: no metrics in it yet; let the run finish an iteration")
    return {
        name: (np.array(sorted(values)), np.array([values[at] for at in sorted(values)]))
        for name, values in points.items()
    }


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """[n] to [n]: mean over a centred window of ``width`` (odd) points, narrower at the ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    right = np.minimum(np.arange(len(values)) + half + 1, len(values))
    left = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[right] - sums[left]) / (right - left)


def present_panels(curves: Mapping[str, Curve]) -> list[Panel]:
    """The panels of which the run has at least one metric."""
    return [
        panel
        for panel in PANELS
        if any(metric in curves or f"eval/{metric}" in curves for metric, _, _ in panel.series)
    ]


def plot_run(metrics: Path, output: Path, *, title: str = "") -> list[str]:
    """Draw a run's curves into one PNG, which appears whole or not at all.

    Args:
        metrics: a ``metrics.jsonl``, or the run's folder.
        output: the PNG; its folder is made.
        title: printed above; the run folder's name where empty.

    Returns:
        Titles of the panels drawn.

    Raises:
        DataError: nothing to draw (see :func:`read_metrics`), or ``output`` is not a PNG.
    """
    if output.suffix.lower() != ".png":
        raise DataError(f"{output}: the plot is a PNG; give a name ending in .png")
    path = metrics / "metrics.jsonl" if metrics.is_dir() else metrics
    curves = read_metrics(path)
    panels = present_panels(curves)
    if not panels:
        known = ", ".join(metric for panel in PANELS for metric, _, _ in panel.series)
        raise DataError(f"{path}: none of the metrics to draw is in it; expected some of {known}")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    held_out = " (dashed: held out)" if any(name.startswith("eval/") for name in curves) else ""
    figure.suptitle((title or path.resolve().parent.name) + held_out)
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, columns, index + 1), panel, curves)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.part")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, output)
    return [panel.title for panel in panels]


def _draw(axes: Axes, panel: Panel, curves: Mapping[str, Curve]) -> None:
    log = False
    for metric, label, colour in panel.series:
        if metric in curves:
            iterations, values = curves[metric]
            log = panel.log and bool((values > 0).any())
            _training_curve(axes, iterations, values, label=label, colour=colour, dots=log)
        if f"eval/{metric}" in curves:
            iterations, values = curves[f"eval/{metric}"]
            axes.plot(iterations, values, "o--", color=colour, linewidth=1.2, markersize=4)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.6", linewidth=0.8, zorder=0)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("iteration", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)
    if panel.right and panel.right[0] in curves:
        metric, label = panel.right
        right = axes.twinx()
        right.plot(*curves[metric], color=_ORANGE, linewidth=1.2)
        right.set_ylabel(label, fontsize=9, color=_ORANGE)
        right.tick_params(labelsize=8, colors=_ORANGE)


def _training_curve(
    axes: Axes, iterations: np.ndarray, values: np.ndarray, *, label: str, colour: str, dots: bool
) -> None:
    if dots:
        axes.plot(iterations, values, ".", color=colour, markersize=3, label=label)
    elif len(values) < _SMOOTH_FROM:
        # A dot each, as a single point has no line.
        axes.plot(iterations, values, ".-", color=colour, linewidth=1.2, markersize=3, label=label)
    else:
        axes.plot(iterations, values, color=colour, linewidth=0.6, alpha=0.3)
        width = max(5, len(values) // 40) // 2 * 2 + 1
        axes.plot(iterations, running_mean(values, width), color=colour, linewidth=1.6, label=label)
