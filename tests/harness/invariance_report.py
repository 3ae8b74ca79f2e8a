"""The layout-invariance matrix as a table: ``make invariance``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path

from layout_case import LayoutCase
from matrix import CASES, FULL_PRODUCT, TOLERANCE, Differences, measure
from rank_pool import RankPool, RanksFailed
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = [field.name for field in fields(Differences)]


def run(argv: Sequence[str]) -> int:
    """Print the table as it is made and write it down; 1 where a tolerance is broken."""
    parser = argparse.ArgumentParser(prog="matrix.py", description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"all {len(FULL_PRODUCT)} cases, not {len(CASES)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = {name: case for name, case in (FULL_PRODUCT if args.full else CASES).items() if args.only in name}
    if not cases:
        parser.error(f"no case contains {args.only!r}")
    started = time.perf_counter()
    found, failed = _measure_all(cases)
    lines = _table(found)
    broken = [name for name, gaps in found.items() if not _within(gaps)]
    verdict = f"{len(found) - len(broken)} of {len(cases)} cases within {TOLERANCE.gradient:.0e}"
    print(f"{verdict}, {time.perf_counter() - started:.0f} s", *failed, sep="\n")
    if args.only == "":
        _write(args.output, found, lines, verdict)
    return 1 if broken or failed else 0


def _measure_all(cases: dict[str, LayoutCase]) -> tuple[dict[str, Differences], list[str]]:
    pool = RankPool(4)
    found: dict[str, Differences] = {}
    failed: list[str] = []
    width = max(map(len, cases))
    print(f"{'case':{width}}  " + "  ".join(f"{name:>14}" for name in COLUMNS))
    try:
        bar = tqdm(cases.items(), unit="case", leave=False)
        for name, case in bar:
            try:
                found[name] = gaps = measure(pool, case)
            except RanksFailed as error:
                failed.append(f"{name}: {error}")
                continue
            numbers = "  ".join(f"{gap:14.1e}" for gap in asdict(gaps).values())
            bar.write(f"{name:{width}}  {numbers}" + ("" if _within(gaps) else "  BROKEN"))
    finally:
        pool.close()
    return found, failed


def _within(gaps: Differences) -> bool:
    allowed = asdict(TOLERANCE)
    return all(gap <= allowed[name] for name, gap in asdict(gaps).items())


def _table(found: dict[str, Differences]) -> list[str]:
    head = ["| case | " + " | ".join(COLUMNS).replace("_", " ") + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = [
        f"| {name} | " + " | ".join(f"{gap:.1e}" for gap in asdict(gaps).values()) + " |"
        for name, gaps in found.items()
    ]
    worst = {name: max(asdict(gaps)[name] for gaps in found.values()) for name in COLUMNS} if found else {}
    return [*head, *rows, "| **largest** | " + " | ".join(f"**{gap:.1e}**" for gap in worst.values()) + " |"]


def _write(folder: Path, found: dict[str, Differences], lines: list[str], verdict: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used, gloo",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = {**facts, "tolerance": asdict(TOLERANCE), "cases": {name: asdict(gaps) for name, gaps in found.items()}}
    (folder / "layout_invariance.json").write_text(json.dumps(data, indent=1) + "\n")
    text = [
        "# Layout invariance",
        "",
        "`make invariance`: Megatron-Core in fp32 against one process, one graph, float64, no Megatron. Differences",
        "are relative, defined in `tests/harness/matrix.py`; the weights are those after three updates, by SGD or",
        "(distopt) Adam.",
        "",
        f"{verdict}. {facts['date']}, commit {facts['commit']}, {facts['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + ".",
        "",
        *lines,
        "",
    ]
    (folder / "layout_invariance.md").write_text("\n".join(text))
