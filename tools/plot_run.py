"""Draw a run's curves (loss, margin, accuracy, log-probabilities, ...) from its metrics.jsonl into one PNG."""

from __future__ import annotations

from pathlib import Path

from megatron_groupdpo.config import CommandParser
from megatron_groupdpo.entry import run_entry


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="plot_run.py", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: training.png beside metrics.jsonl")
    parser.add_argument("--title", default="", help="default: the folder's name")
    return parser


def main() -> None:
    """Parse, draw, say where it is."""
    args = build_parser().parse_args()
    from megatron_groupdpo.run.logs.plots import plot_run  # matplotlib takes seconds to import

    folder = args.run if args.run.is_dir() else args.run.parent
    output = args.output or folder / "training.png"
    panels = plot_run(args.run, output, title=args.title)
    print(f"{output}: {', '.join(panels)}")


if __name__ == "__main__":
    run_entry(main)
