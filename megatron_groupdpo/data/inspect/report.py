"""An inspection as text for a terminal."""

from __future__ import annotations

import textwrap

from megatron_groupdpo.data.counts import summary_table
from megatron_groupdpo.data.inspect.inspection import Inspection
from megatron_groupdpo.data.inspect.stats import QUANTILES, TITLES

_COLUMNS = ("mean", "min", *QUANTILES, "max")


def report(inspection: Inspection, *, width: int = 100) -> str:
    """The whole report: totals, distributions, what preprocessing did, warnings."""
    stats = inspection.stats
    parts = [f"{inspection.name}\n{totals(inspection)}", statistics_table(inspection)]
    if stats.num_compared:
        longer = stats.num_positives_longer / stats.num_compared
        parts[-1] += (
            f"\nlength of positives / negatives of their group: {stats.length_ratio:.2f} (geometric mean of "
            f"{stats.num_compared:,} groups); positives are longer in {longer:.1%}"
        )
    if inspection.preprocessing:
        parts.append("preprocessing\n" + textwrap.indent(summary_table(inspection.preprocessing), "  "))
    if inspection.end_tokens:
        listed = ", ".join(f"{name}: {count:,}" for name, count in inspection.end_tokens.items())
        parts.append(f"last tokens of responses: {listed}")
    if inspection.notes:
        parts.append(
            "\n".join(textwrap.fill(f"note: {note}", width, subsequent_indent="  ") for note in inspection.notes)
        )
    parts.append(warnings_text(inspection, width=width))
    return "\n\n".join(parts)


def totals(inspection: Inspection) -> str:
    """One line: groups, responses, sides."""
    num = inspection.stats.num
    line = f"{num['groups']:,} groups, {num['responses']:,} responses"
    line += f": {num['positives']:,} positive, {num['negatives']:,} negative"
    return line + (f", {num['unlabelled']:,} without label" if num["unlabelled"] else "")


def table_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """Head and rows of the table of distributions; those without a number are left out."""
    rows: list[tuple[str, ...]] = [("", *_COLUMNS)]
    for name, title in TITLES.items():
        summary = inspection.stats.distributions[name].summary()
        if summary is not None:
            unit = f" ({inspection.unit})" if name in ("prompt_length", "response_length", "row_length") else ""
            rows.append((title + unit, *(_number(summary[column]) for column in _COLUMNS)))
    return rows


def statistics_table(inspection: Inspection) -> str:
    """The distributions as aligned lines."""
    rows = table_rows(inspection)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )


def warnings_text(inspection: Inspection, *, width: int = 100) -> str:
    """Each warning with its number, threshold and advice."""
    if not inspection.findings:
        return "no warnings"
    lines = [f"{len(inspection.findings)} warning{'s' if len(inspection.findings) > 1 else ''}"]
    for finding in inspection.findings:
        lines += [f"* {finding.code}"]
        lines += textwrap.wrap(finding.text, width, initial_indent="    ", subsequent_indent="    ")
        lines += textwrap.wrap(f"-> {finding.advice}", width, initial_indent="    ", subsequent_indent="       ")
        if finding.examples:
            shown = ", ".join(_shorten(finding.examples))
            lines += textwrap.wrap(f"for example {shown}", width, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)


def _shorten(examples: tuple[str, ...]) -> list[str]:
    """A file's name once, then its lines alone."""
    files = [example.rpartition(":")[0] for example in examples]
    return [
        example.removeprefix(file) if file and before == file else example
        for example, file, before in zip(examples, files, ["", *files])
    ]


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
