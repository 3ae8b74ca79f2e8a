"""The demo over several seeds: how much held-out accuracy GroupDPO adds, and how far the seeds lie apart.

    python benchmarks/demo_seeds.py [--seeds 1 2 3]

Writes benchmarks/results/demo_seeds.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from record import RESULTS, ROOT, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dir", type=Path, default=ROOT / "runs", help="where the demos work (runs)")
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        folder = args.dir / f"demo_seed{seed}"
        command = [sys.executable, str(ROOT / "examples/demo/run.py"), "--seed", str(seed), "--dir", str(folder)]
        subprocess.run(command, check=True)
        results.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    record = {"machine": machine(), "seeds": results}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo_seeds.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "demo_seeds.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


def markdown(record: dict) -> str:
    """One row per metric: mean over seeds and each seed's before -> after."""
    seeds = record["seeds"]
    names = [name for name in seeds[0] if name not in ("seed", "seconds")]
    lines = [
        "# The demo over seeds",
        "",
        "Held-out prompts, before (warm start) and after (GroupDPO); `python benchmarks/demo_seeds.py`.",
        "",
        "| metric | mean change | lowest | highest | " + " | ".join(f"seed {s['seed']}" for s in seeds) + " |",
        "|---|---|---|---|" + "---|" * len(seeds),
    ]
    for name in names:
        changes = [s[name]["after"] - s[name]["before"] for s in seeds]
        each = " | ".join(f"{s[name]['before']:.3f} -> {s[name]['after']:.3f}" for s in seeds)
        lines.append(
            f"| {name} | {statistics.mean(changes):+.3f} | {min(changes):+.3f} | {max(changes):+.3f} | {each} |"
        )
    lines += ["", "Wall time: " + ", ".join(f"{s['seconds']:.0f} s" for s in seeds) + ".", ""]
    lines += [f"- {key}: {value}" for key, value in record["machine"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
