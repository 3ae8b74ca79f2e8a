"""Table and picture of :mod:`memory_vs_group_size`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench_output import BLUE, MIB, ORANGE, machine_lines, mebibytes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from memory_rank import MODES, Layout, Point

Value = Callable[[Point], int]
Measured = Sequence[tuple[Layout, Sequence[Point]]]


def fullest(points: Sequence[Point], mode: str, length: int, value: Value) -> dict[int, Point]:
    """Per group size, the stage that holds most."""
    stages: dict[int, list[Point]] = {}
    for point in points:
        if (point.mode, point.length) == (mode, length):
            stages.setdefault(point.group_size, []).append(point)
    return {group_size: max(found, key=value) for group_size, found in sorted(stages.items())}


def table(measured: Measured, value: Value, *, against_schedule: bool) -> list[str]:
    """Markdown: a line per layout, length and mode; MiB on the stage that holds most."""
    sizes = sorted({size for layout, _ in measured for size in layout.group_sizes})
    heads = ["layout", "tokens", "backward", *(f"N = {size}" for size in sizes), "last / first"]
    lines = ["| " + " | ".join(heads + ["from the schedule's count"] * against_schedule) + " |"]
    lines.append("|---" * 3 + "|---:" * (len(lines[0].split("|")) - 5) + "|")
    for layout, points in measured:
        for length in layout.lengths:
            for mode in MODES:
                found = fullest(points, mode, length, value)
                cells = [mebibytes(value(found[size])) if size in found else "" for size in sizes]
                ratio = value(found[max(found)]) / value(found[min(found)])
                cells += [f"{ratio:.3f}" if ratio < 2 else f"{ratio:.1f}"]
                if against_schedule:
                    gaps = [point.peak_saved / point.expected_saved - 1 for point in found.values()]
                    cells.append(f"{max(gaps, key=abs):+.2%}")
                lines.append("| " + " | ".join([layout.name, str(length), mode, *cells]) + " |")
    return lines


def markdown(measured: Measured, record: dict[str, Any]) -> str:
    """The result as a page."""
    first = measured[0][0]
    most = max(point.num_responses for _, points in measured for point in points)
    model = first.model
    lines = [
        "# Memory against the size of a group",
        "",
        f"`{record['command']}`",
        "",
        f"A Llama-like model ({model['num_layers']} layers, width {model['hidden_size']}, vocabulary "
        f"{model['vocab_size']}, {'bf16' if first.bf16 else 'fp32'}) on Megatron-Core, {first.num_groups} groups a "
        f"batch, prompts of {first.prompt_length} tokens, every response as long as given. Decoupled: the two passes, "
        f"{first.micro_batch_size} responses a microbatch. Coupled: one graph a group, hence one group a microbatch.",
        "",
        "## Peak bytes saved for backward (MiB)",
        "",
        "Exact: the unique storages that `torch.autograd.graph.saved_tensors_hooks` sees alive at a time, parameters "
        "and buffers excluded, on the pipeline stage that holds most. The last column is the largest distance, over "
        "N, from what one microbatch's forward saves times the microbatches in flight on that stage, "
        "min(PP - stage, M); interleaved, the same by chunk; with recomputation, plus one layer, an upper bound, since "
        "what the output layer saved is free again before a layer is recomputed.",
        "",
        *table(measured, lambda point: point.peak_saved, against_schedule=True),
        "",
        *(f"- {line}" for line in record["laws"]),
        "",
        "What does grow with N beside activations: the per-response vectors (log-probabilities, reference, scores, "
        f"weights) of {most} responses are {most * 8 / 1024:.1f} KiB each, and the token ids of the batch. Neither is "
        "saved for backward by the decoupled step beyond its microbatch's part.",
        "",
        *_allocated(measured),
        *machine_lines(record["machine"]),
    ]
    return "\n".join(lines) + "\n"


def _allocated(measured: Measured) -> list[str]:
    if not any(point.allocated for _, points in measured for point in points):
        return [
            "Peak allocated memory on a GPU (`--device cuda`) has not been measured: there was none.",
            "",
        ]
    return [
        "## Peak allocated in forward and backward, less parameters and optimizer (MiB)",
        "",
        "`torch.cuda.max_memory_allocated` over forward and backward after 3 warm-up steps, before the update; "
        "gradient buffers are part of it (the JSON file has them apart).",
        "",
        *table(measured, lambda point: point.allocated["overhead"], against_schedule=False),
        "",
    ]


def figure(measured: Measured, value: Value, title: str) -> Figure:
    """One panel a layout: N against MiB, both logarithmic; colour says the backward, the line's style the length."""
    picture = Figure(figsize=(3.2 * len(measured) + 0.6, 4.0), layout="constrained")
    axes = picture.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    styles = dict(zip(sorted({n for layout, _ in measured for n in layout.lengths}), [":", "--", "-", "-."] * 3))
    for panel, (layout, points) in zip(axes, measured):
        _panel(panel, layout, points, value, styles)
    axes[0].set_ylabel("MiB, on the stage that holds most")
    handles: dict[str, Any] = {}
    for panel in axes:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels())))
    ordered = sorted(handles, key=lambda label: (label.split()[0], -int(label.split()[1])))
    picture.legend([handles[label] for label in ordered], ordered, loc="outside lower center", ncols=6, fontsize=8)
    picture.suptitle(title, fontsize=11)
    return picture


def _panel(axes: Axes, layout: Layout, points: Sequence[Point], value: Value, styles: dict[int, str]) -> None:
    for length in layout.lengths:
        for mode, colour in zip(MODES, (BLUE, ORANGE)):
            found = fullest(points, mode, length, value)
            sizes = [value(point) / MIB for point in found.values()]
            label = f"{mode}, {length} tokens"
            axes.plot(
                list(found), sizes, styles[length], color=colour, marker="o", markersize=3, linewidth=1.4, label=label
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(layout.group_sizes, [str(size) for size in layout.group_sizes])
    axes.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.minorticks_off()
    axes.set_title(layout.name, fontsize=10)
    axes.set_xlabel("responses in a group, N", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
