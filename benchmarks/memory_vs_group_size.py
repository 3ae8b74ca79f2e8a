"""Memory of the backward against the number of responses N in a group: flat with two passes, linear with one graph.

    python benchmarks/memory_vs_group_size.py [--pipelines 1 2 4] [--lengths 64 128 256]
    python benchmarks/memory_vs_group_size.py --device cuda --bf16 --hidden-size 1024 --vocab-size 32000

Counts the bytes saved for backward on real Megatron-Core, on several gloo ranks of this CPU or on GPUs, where peak
allocated memory is measured too. Writes benchmarks/results/memory_vs_group_size.{json,md,png} and fails when decoupled
memory moves with N by more than 2 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_output import write_figure, write_text
from memory_rank import MODES, Layout, Point, law_breaks, measure_layout
from memory_report import figure, markdown
from record import RESULTS, machine
from torch import multiprocessing

from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError

TOLERANCE = 0.02


def main() -> None:
    args = parse_arguments()
    layouts = make_layouts(args)
    check(layouts, args)
    command = "python benchmarks/memory_vs_group_size.py " + " ".join(sys.argv[1:])
    measured, progress = [], Progress(layouts)
    for layout in layouts:
        measured.append((layout, run_layout(layout, progress)))
    laws, broken = judge(measured, on_cuda=args.device == "cuda")
    record = {"command": command.strip(), "machine": machine(args.device), "laws": laws}
    write_results(args.output, measured, record)
    if broken:
        raise SystemExit("memory of the decoupled step moves with N:\n" + "\n".join(broken))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU a pipeline stage (%(default)s)")
    add("--pipelines", type=int, nargs="+", default=[1, 2, 4], help="pipeline sizes (%(default)s)")
    add("--lengths", type=int, nargs="+", default=[64, 128, 256], help="response tokens (%(default)s)")
    add("--group-sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="N (%(default)s)")
    add("--num-groups", type=int, default=4, help="groups of a batch (%(default)s)")
    add("--micro-batch-size", type=int, default=2, help="responses a microbatch, decoupled (%(default)s)")
    add("--num-layers", type=int, default=4, help="of the model (%(default)s)")
    add("--hidden-size", type=int, default=64, help="of the model, a multiple of 16 (%(default)s)")
    add("--vocab-size", type=int, default=512, help="of the model (%(default)s)")
    add("--bf16", action="store_true", help="weights and activations in bf16")
    add("--output", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    return parser.parse_args()


def make_layouts(args: argparse.Namespace) -> list[Layout]:
    """Each pipeline size; with 2 among them, also interleaved and with recomputation, at the middle length."""
    model: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.hidden_size // 16 if args.hidden_size < 1024 else args.hidden_size // 64,
        "ffn_hidden_size": args.hidden_size * 8 // 3 // 4 * 4,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": max(args.lengths) + 16,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
    }
    common: dict[str, Any] = {
        "model": model,
        "group_sizes": tuple(sorted(args.group_sizes)),
        "num_groups": args.num_groups,
        "micro_batch_size": args.micro_batch_size,
        "bf16": args.bf16,
        "device": args.device,
    }
    lengths = tuple(sorted(args.lengths))
    layouts = [Layout(name=f"PP {size}", pipeline=size, lengths=lengths, **common) for size in args.pipelines]
    if 2 in args.pipelines:
        common["lengths"] = (lengths[len(lengths) // 2],)
        layouts.append(Layout(name="PP 2, 2 chunks a stage", pipeline=2, chunks=2, **common))
        layouts.append(Layout(name="PP 2, full recomputation", pipeline=2, recompute=True, **common))
    return layouts


def check(layouts: list[Layout], args: argparse.Namespace) -> None:
    """Refuse a sweep that would not show the law.

    Raises:
        ConfigError: too few microbatches, GPUs or layers.
    """
    if odd := [size for size in args.group_sizes if size < 2]:
        raise ConfigError(f"--group-sizes must be at least 2, a positive and a negative: got {odd}")
    fewest = min(args.num_groups, args.num_groups * min(args.group_sizes) // args.micro_batch_size)
    for layout in layouts:
        stages = layout.pipeline * (layout.chunks or 1)
        if fewest < stages:
            raise ConfigError(
                f"{layout.name} needs {stages} microbatches at every N, else a fuller pipeline looks like growth with "
                f"N; the smallest batch has {fewest}: raise --num-groups or lower --micro-batch-size"
            )
        if args.num_layers % stages:
            raise ConfigError(f"--num-layers ({args.num_layers}) must be a multiple of {stages} for {layout.name}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cuda" and gpus < max(args.pipelines):
        raise ConfigError(
            f"--device cuda needs a GPU for each of {max(args.pipelines)} stages, and there are {gpus}; lower "
            "--pipelines or set --device cpu"
        )


class Progress:
    """A line per point, with the time left by the tokens still to go."""

    def __init__(self, layouts: list[Layout]) -> None:
        self.left = [
            (size * length * (4 if mode == "decoupled" else 3))
            for layout in layouts
            for length in layout.lengths
            for size in layout.group_sizes
            for mode in MODES
        ]
        self.total, self.start = sum(self.left), time.monotonic()

    def __call__(self, what: str) -> None:
        self.left.pop(0)
        done = 1 - sum(self.left) / self.total
        elapsed = time.monotonic() - self.start
        left = elapsed / done - elapsed
        print(f"[{done:4.0%}, {elapsed:.0f} s, about {left:.0f} s left] {what}", file=sys.stderr, flush=True)


def run_layout(layout: Layout, progress: Progress) -> list[Point]:
    """Start a process per stage; the points of all stages."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks: more would fight over the cores
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    ranks = multiprocessing.spawn(_rank, args=(layout, port, answers), nprocs=layout.pipeline, join=False)
    points: list[Point] = []
    finished = False
    while not finished or not answers.empty():
        while not answers.empty():
            answer = answers.get()
            progress(answer) if isinstance(answer, str) else points.extend(answer)
        finished = finished or ranks.join(timeout=0.2)  # raises with a failed rank's traceback
    return points


def _rank(rank: int, layout: Layout, port: int, answers: Any) -> None:
    size = str(layout.pipeline)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answers.put(measure_layout(layout, tell=answers.put if rank == 0 else lambda _: None))


def judge(measured: list[tuple[Layout, list[Point]]], *, on_cuda: bool) -> tuple[list[str], list[str]]:
    """What held, and what did not."""
    laws, broken = [], []
    values = {"bytes saved for backward": lambda point: point.peak_saved}
    if on_cuda:
        values["allocated overhead"] = lambda point: point.allocated["overhead"]
    for name, value in values.items():
        found = [
            f"{layout.name}: {line}"
            for layout, points in measured
            for line in law_breaks(points, value=value, tolerance=TOLERANCE)
        ]
        verdict = "BROKEN" if found else "holds"
        laws.append(f"{name}, decoupled, every stage, every N within {TOLERANCE:.0%} of the smallest N: {verdict}")
        broken += found
    laws.append("the scoring pass saves nothing for backward: holds")  # law_breaks asserts it
    return laws, broken


def write_results(folder: Path, measured: list[tuple[Layout, list[Point]]], record: dict[str, Any]) -> None:
    page = markdown(measured, record)
    layouts = [
        {**dataclasses.asdict(layout), "points": [dataclasses.asdict(point) for point in points]}
        for layout, points in measured
    ]
    write_text(folder / "memory_vs_group_size.json", json.dumps({**record, "layouts": layouts}) + "\n")
    write_text(folder / "memory_vs_group_size.md", page)
    on_cuda = any(point.allocated for _, points in measured for point in points)
    picture = (
        figure(measured, lambda point: point.allocated["overhead"], "Peak allocated less parameters and optimizer")
        if on_cuda
        else figure(measured, lambda point: point.peak_saved, "Peak bytes saved for backward")
    )
    write_figure(folder / "memory_vs_group_size.png", picture)
    print(page)


if __name__ == "__main__":
    run_entry(main)
