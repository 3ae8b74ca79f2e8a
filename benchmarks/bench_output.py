"""How a benchmark's result is written: whole files, one set of colours, sizes in MiB."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, and in print.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
MIB = 2**20


def machine_lines(record: dict[str, str]) -> list[str]:
    """As a Markdown list."""
    return [f"- {key}: {value}" for key, value in record.items()]


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_figure(path: Path, figure: Figure) -> None:
    """A PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    partial = path.with_name(f"{path.name}.part")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)


def mebibytes(num_bytes: float) -> str:
    """Three significant digits from 10 MiB down, whole ones above."""
    size = num_bytes / MIB
    return f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"
