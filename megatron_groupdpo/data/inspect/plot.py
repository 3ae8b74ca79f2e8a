"""Histograms of an inspection, as one PNG or as one HTML file that needs nothing else.

Imports matplotlib's figure alone, not pyplot: no display, no global state, nothing to close.
"""

from __future__ import annotations

import html
import io
import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from megatron_groupdpo.data.inspect.inspection import Inspection
from megatron_groupdpo.data.inspect.report import table_rows, totals
from megatron_groupdpo.data.inspect.stats import Distribution
from megatron_groupdpo.errors import ConfigError

# Okabe and Ito's colours: told apart with any colour vision, and in print.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
_BINS = 40
SUFFIXES = (".png", ".html")


def check_plot_name(output: Path) -> None:
    """ConfigError unless the name says PNG or HTML."""
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot must end in {' or '.join(SUFFIXES)}, got {output}")


def plot_inspection(inspection: Inspection, output: Path) -> None:
    """Write the histograms; the file appears whole or not at all.

    Raises:
        ConfigError: ``output`` is neither PNG nor HTML by its name.
    """
    check_plot_name(output)
    figure = _draw(inspection)
    if output.suffix.lower() == ".png":
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        content = buffer.getvalue()
    else:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        drawing = buffer.getvalue()
        content = _page(inspection, drawing[drawing.index("<svg") :]).encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.part")
    partial.write_bytes(content)
    os.replace(partial, output)


def _draw(inspection: Inspection) -> Figure:
    figure = Figure(figsize=(13.5, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    name = inspection.name if len(inspection.name) <= 110 else "..." + inspection.name[-107:]
    figure.suptitle(f"{name}\n{totals(inspection)}", fontsize=11)
    panels = [figure.add_subplot(2, 3, number) for number in range(1, 7)]
    distributions = inspection.stats.distributions
    _counts(panels[0], distributions["group_size"], "responses per group", "groups", "group size")
    lengths = {"prompts": (distributions["prompt_length"], _BLUE)}
    if distributions["row_length"].num and inspection.unit == "tokens":
        lengths["prompt + response"] = (distributions["row_length"], _GREY)
    _shares(panels[1], lengths, f"length ({inspection.unit})", "prompt and row length")
    sides = {
        "positives": (distributions["positive_length"], _GREEN),
        "negatives": (distributions["negative_length"], _ORANGE),
    }
    if not all(side.num for side, _ in sides.values()):
        sides = {"responses": (distributions["response_length"], _BLUE)}
    _shares(panels[2], sides, f"length ({inspection.unit})", "response length")
    balance = {"positives": (distributions["positives"], _GREEN), "negatives": (distributions["negatives"], _ORANGE)}
    _side_counts(panels[3], balance)
    _counts(panels[4], distributions["value_gap"], "best - worst value", "groups", "value gap within groups")
    correlation = distributions["length_correlation"]
    _counts(panels[5], correlation, "Pearson's r", "groups", "length-value correlation within groups", span=(-1.0, 1.0))
    if correlation.num:
        panels[5].axvline(0, color="0.6", linewidth=0.8)
        panels[5].axvline(correlation.mean, color=_ORANGE, linewidth=1.4, label=f"mean {correlation.mean:+.2f}")
        panels[5].legend(fontsize=8)
    return figure


def _counts(
    axes: Axes, data: Distribution, xlabel: str, ylabel: str, title: str, span: tuple[float, float] | None = None
) -> None:
    """A histogram of counts; whole numbers over a short range have a bar each."""
    _dress(axes, xlabel, ylabel, title)
    if _is_empty(axes, data):
        return
    values, counts = data.points()
    if span is None and bool((values == np.round(values)).all()) and values[-1] - values[0] < _BINS:
        axes.bar(values, counts, width=0.8, color=_BLUE)
        axes.set_xlim(min(values[0] - 1, max(values[-1] - 4, 0)), values[-1] + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.hist(values, bins=_edges([data], span), weights=counts, color=_BLUE)  # type: ignore[arg-type]
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _shares(axes: Axes, series: dict[str, tuple[Distribution, str]], xlabel: str, title: str) -> None:
    """Histograms as shares of each series, on common bins up to the 99th percentile."""
    _dress(axes, xlabel, "share", title)
    present = {name: pair for name, pair in series.items() if pair[0].num}
    if not present:
        _is_empty(axes, Distribution())
        return
    edges = _edges([data for data, _ in present.values()], None, cut=0.99)
    is_cut = False
    for name, (data, colour) in present.items():
        values, counts = data.points()
        is_cut = is_cut or values[-1] > edges[-1]
        shares = counts / counts.sum()
        label = f"{name}: median {data.quantile(0.5):,.0f}, longest {data.max:,.0f}"
        options = {"histtype": "stepfilled", "alpha": 0.35, "color": colour, "weights": shares}
        axes.hist(np.minimum(values, edges[-1]), bins=edges, label=label, **options)  # type: ignore[arg-type]
        options = {"histtype": "step", "color": colour, "weights": shares, "linewidth": 1.4}
        axes.hist(np.minimum(values, edges[-1]), bins=edges, **options)  # type: ignore[arg-type]
    if is_cut:
        axes.set_xlabel(f"{xlabel}; the last bar holds all that is longer", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.legend(fontsize=8, loc="upper right")


def _side_counts(axes: Axes, series: dict[str, tuple[Distribution, str]]) -> None:
    _dress(axes, "responses of that side in a group", "groups", "positives and negatives per group")
    present = {name: pair for name, pair in series.items() if pair[0].num}
    if not present:
        _is_empty(axes, Distribution())
        return
    for shift, (name, (data, colour)) in zip((-0.2, 0.2), present.items()):
        values, counts = data.points()
        axes.bar(values + shift, counts, width=0.4, color=colour, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)
    axes.legend(fontsize=8, loc="upper right", ncols=2)


def _edges(series: list[Distribution], span: tuple[float, float] | None, cut: float = 1.0) -> np.ndarray:
    low, high = span or (min(data.min for data in series), max(data.quantile(cut) for data in series))
    if span is None and all(bool((data.points()[0] % 1 == 0).all()) for data in series):
        # whole steps: else some bars would hold one whole number more than their neighbours
        step = max(1, math.ceil((high - low + 1) / _BINS))
        return np.arange(low, high + step + 1, step) - 0.5
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, _BINS + 1)


def _is_empty(axes: Axes, data: Distribution) -> bool:
    if data.num:
        return False
    axes.text(0.5, 0.5, "not given by the data", ha="center", va="center", transform=axes.transAxes, color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    return True


def _dress(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _page(inspection: Inspection, drawing: str) -> str:
    """The report as HTML, with the drawing inside."""
    head, *rows = table_rows(inspection)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) + "</tr>" for row in rows)
    found = "".join(
        f"<li><b>{html.escape(finding.code)}</b> {html.escape(finding.text)}<br>&rarr; {html.escape(finding.advice)}"
        + (f"<br><small>for example {html.escape(', '.join(finding.examples))}</small>" if finding.examples else "")
        + "</li>"
        for finding in inspection.findings
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in inspection.notes)
    style = (
        "body{font:14px sans-serif;margin:2em;max-width:1400px}svg{width:100%;height:auto}td,th{padding:.2em .8em;"
        "text-align:right}td:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}li{margin:.5em 0}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(inspection.name)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(inspection.name)}</h1>"
        f"<p>{html.escape(totals(inspection))}</p>{drawing}<table><tr>{cells}</tr>{body}</table>"
        f"<h2>{len(inspection.findings)} warnings</h2><ul>{found}</ul>{notes}</body></html>\n"
    )
