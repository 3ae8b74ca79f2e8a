"""Draw a run's curves (loss, margin, accuracy, log-probabilities, ...) from its metrics.jsonl into one PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.run.logs.plots import plot_run


def main() -> None:
    """Parse, draw, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: training.png beside metrics.jsonl")
    parser.add_argument("--title", default="", help="default: the folder's name")
    args = parser.parse_args()
    folder = args.run if args.run.is_dir() else args.run.parent
    output = args.output or folder / "training.png"
    panels = plot_run(args.run, output, title=args.title)
    print(f"{output}: {', '.join(panels)}")


if __name__ == "__main__":
    run_entry(main)
