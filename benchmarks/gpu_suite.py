"""One command for a machine with one GPU and no network: correctness, then performance, part by part.

    benchmarks/gpu_suite.sh                                        everything, within 25 minutes
    benchmarks/gpu_suite.sh --list
    benchmarks/gpu_suite.sh --parts rates groups-1b-bf16           some parts
    benchmarks/gpu_suite.sh --device cpu --scale tiny --output runs/gpu_suite_tiny      the same code without a GPU

Every part is a process of its own with a time limit. Its points are written as they are measured, and the report
(gpu_suite.{json,md,png}) after every part. A part that is done is skipped when the command is given again; --again
measures it anew. A part that fails is recorded with its error and the rest goes on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_parts
from bench_output import write_text
from gpu_context import Context
from gpu_report import write_report
from record import RESULTS, ROOT, machine

from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError

DONE, FAILED, REFUSED, NOT_RUN = "done", "failed", "refused", "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a part."""

    name: str
    on: str
    """Device and scale: what was done on a CPU is not done on a GPU."""
    state: str
    seconds: float
    error: str | None
    machine: dict[str, str]
    points: list[dict[str, Any]]


def main() -> None:
    args = parse_arguments()
    if args.list:
        for name, part in gpu_parts.PARTS.items():
            print(f"{name:20} {part.limit_s:4d} s at most  {part.about}")
        return
    if unknown := [name for name in args.parts or () if name not in gpu_parts.PARTS]:
        raise ConfigError(f"no part {unknown[0]!r}; the parts are: {', '.join(gpu_parts.PARTS)}")
    if args.device == "cuda" and args.scale == "full":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("the suite needs a GPU, and there is none; for its code alone: --device cpu --scale tiny")
    if args.run_part:
        run_part(args.run_part, args)
        return
    raise SystemExit(run_suite(args))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="list the parts and leave")
    add("--parts", nargs="+", metavar="PART", help="the parts to run (all)")
    add("--again", action="store_true", help="run parts that are done, too")
    add("--budget-minutes", type=float, default=25.0, help="no part runs beyond this (%(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    add("--scale", choices=("full", "tiny"), default="full", help="tiny: the same code on toy sizes (%(default)s)")
    add("--output", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    add("--run-part", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_suite(args: argparse.Namespace) -> int:
    """Run what is to run; the exit code."""
    start, names = time.monotonic(), args.parts or list(gpu_parts.PARTS)
    folder = args.output / "gpu_suite_parts"
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, 1):
        title = f"[{index}/{len(names)}, {time.monotonic() - start:.0f} s] {name}"
        before = read_outcome(folder, name)
        if before is not None and before["on"] != where(args):
            before = None
        if before is not None and before["state"] in (DONE, REFUSED) and not args.again:
            print(f"{title}: {before['state']} before, in {before['seconds']:.0f} s", flush=True)
            continue
        left = 60 * args.budget_minutes - (time.monotonic() - start)
        if left < 10:
            print(f"{title}: not run, the budget is spent", flush=True)
            if before is None:
                spent: dict[str, Any] = {"error": "the budget was spent before it", "machine": {}, "points": []}
                write_outcome(folder, Outcome(name=name, on=where(args), state=NOT_RUN, seconds=0, **spent))
            continue
        limit_s = min(left, gpu_parts.PARTS[name].limit_s)
        print(f"{title}: at most {limit_s:.0f} s", flush=True)
        outcome = start_part(name, args, folder, limit_s=limit_s)
        write_outcome(folder, outcome)
        error = f": {outcome.error.strip().splitlines()[-1]}" if outcome.error else ""
        print(f"    {outcome.state} after {outcome.seconds:.0f} s, {len(outcome.points)} points{error}", flush=True)
        report(args, folder)
    print(report(args, folder), flush=True)
    states = {name: (read_outcome(folder, name) or {"state": NOT_RUN})["state"] for name in names}
    bad = [f"{name} ({state})" for name, state in states.items() if state not in (DONE, REFUSED)]
    if bad:
        print(f"not done: {', '.join(bad)}; give the command again to go on", file=sys.stderr)
    return 1 if bad else 0


def start_part(name: str, args: argparse.Namespace, folder: Path, *, limit_s: float) -> Outcome:
    """A part in a process of its own: its memory ends with it, and so does it when its time is up."""
    points_file, error_file = folder / f"{name}.points.jsonl", folder / f"{name}.error.txt"
    machine_file = folder / f"{name}.machine.json"
    for file in (points_file, error_file, machine_file):
        file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--run-part", name, "--device", args.device]
    command += ["--scale", args.scale, "--output", str(args.output)]
    started = time.monotonic()
    # A session of its own, so that what the part starts ends with it.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code, error = process.wait(timeout=limit_s), None
    except subprocess.TimeoutExpired:
        code, error = 1, f"it was ended after its limit of {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    points = [json.loads(line) for line in points_file.read_text().splitlines()] if points_file.is_file() else []
    if code and error is None:
        error = error_file.read_text() if error_file.is_file() else f"the process ended with code {code}"
    failures = [point["error"] for point in points if "error" in point]
    error = error or (failures[0] if failures else None)
    refusals = [point["refused"] for point in points if "refused" in point]
    state = FAILED if error else REFUSED if points and len(refusals) == len(points) else DONE
    return Outcome(
        name=name,
        on=where(args),
        state=state,
        seconds=time.monotonic() - started,
        error=error or (refusals[0] if state == REFUSED else None),
        # Asked by the part: here it would open the GPU and keep memory on it.
        machine=json.loads(machine_file.read_text()) if machine_file.is_file() else {},
        points=points,
    )


def run_part(name: str, args: argparse.Namespace) -> None:
    """In the part's own process: one line a point, as soon as it is there."""
    folder = args.output / "gpu_suite_parts"
    context = Context(device=args.device, tiny=args.scale == "tiny", output=args.output)
    try:
        write_text(folder / f"{name}.machine.json", json.dumps(machine(args.device)))
        with (folder / f"{name}.points.jsonl").open("w", encoding="utf-8") as file:
            for point in gpu_parts.PARTS[name].run(context):
                file.write(json.dumps(point) + "\n")
                file.flush()
                print(f"    {gpu_parts.in_words(point)}", flush=True)
    except BaseException:
        write_text(folder / f"{name}.error.txt", traceback.format_exc())
        raise


def where(args: argparse.Namespace) -> str:
    return f"{args.device}, {args.scale}"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    write_text(folder / f"{outcome.name}.json", json.dumps(asdict(outcome)) + "\n")


def read_outcome(folder: Path, name: str) -> dict[str, Any] | None:
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def report(args: argparse.Namespace, folder: Path) -> str:
    outcomes = [outcome for name in gpu_parts.PARTS if (outcome := read_outcome(folder, name)) is not None]
    command = "benchmarks/gpu_suite.sh" + (
        "" if (args.device, args.scale) == ("cuda", "full") else f" --device {args.device} --scale {args.scale}"
    )
    return write_report(args.output, outcomes, command=command)


if __name__ == "__main__":
    run_entry(main)
