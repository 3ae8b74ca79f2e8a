"""Every family against ``transformers``, as a table: ``make parity``.

The families are those of ``tests/hf_examples.py`` and the layouts those of ``test_families.py``, whatever they are: a
family or a layout that is added there is in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "tests/distributed", "benchmarks")]

TOLERANCE = 1e-5


def round_trip_on_rank(folder: Path, work: Path) -> bool:
    """Import, export; whether every tensor and every file that does not change comes back as it was."""
    from safetensors.torch import load_file

    from megatron_groupdpo.config import ParallelConfig
    from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint
    from megatron_groupdpo.convert.importing import ImportOptions, import_hf
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    try:
        ranks = initialize(ParallelConfig(device="cpu"), seed=0)
        import_hf(folder, work / "checkpoint", ImportOptions(overwrite=True), ranks)
        export_checkpoint(work / "checkpoint", work / "back", ExportOptions(overwrite=True))
        before, after = (load_file(path / "model.safetensors") for path in (folder, work / "back"))
        same = before.keys() == after.keys() and all(
            after[name].dtype == tensor.dtype
            and after[name].shape == tensor.shape
            and after[name].flatten().numpy().tobytes() == tensor.flatten().numpy().tobytes()
            for name, tensor in before.items()
        )
        names = ("config.json", "generation_config.json")
        return same and all((work / "back" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    finally:
        shut_down()


def measure(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``{family: {layout: largest difference or None where it does not apply, "round trip": same bytes}}``."""
    import torch
    from hf_examples import save_random_model
    from rank_pool import RankPool
    from test_families import LAYOUTS, MIXTURE_LAYOUTS, logprobs_on_rank, sequences
    from tqdm import tqdm

    from megatron_groupdpo.convert.verify import transformers_logprobs

    layouts = {"one rank": (1, {}, False), **LAYOUTS, **MIXTURE_LAYOUTS}
    pool = RankPool(max(num_ranks for num_ranks, *_ in layouts.values()))
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        root = Path(temporary)
        try:
            for name in tqdm(names, unit=" families", leave=False):
                folder = save_random_model(name, root / name)
                theirs = torch.cat(transformers_logprobs(folder, sequences()))
                row: dict[str, Any] = {}
                for layout, (num_ranks, parallel, packed) in layouts.items():
                    if layout in MIXTURE_LAYOUTS and not _has_experts(folder):
                        row[layout] = None
                        continue
                    answers = pool.run(num_ranks, logprobs_on_rank, {name: folder}, parallel, packed, timeout=300)
                    found = [answer[name] for answer in answers if answer[name] is not None]
                    row[layout] = max(float((ours - theirs).abs().max()) for ours in found)
                row["round trip"] = pool.run(1, round_trip_on_rank, folder, root / f"{name}-work", timeout=300)[0]
                table[name] = row
                tqdm.write(_line(name, row))
        finally:
            pool.close()
    return table


def _has_experts(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return any("expert" in field for field in config)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "same bytes" if value else "DIFFERS"
    return "" if value is None else f"{value:.1e}"


def _line(name: str, row: dict[str, Any]) -> str:
    return f"{name:18} " + "  ".join(f"{layout} {_cell(value)}" for layout, value in row.items())


def main() -> int:
    """Print the table, write it down, and fail where a tolerance is broken."""
    parser = argparse.ArgumentParser(prog="family_parity.py", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="families whose name contains this; nothing is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hf_examples import CONFIGS
    from record import machine

    names = [name for name in CONFIGS if args.only in name]
    if not names:
        parser.error(f"no family contains {args.only!r}; there are {', '.join(CONFIGS)}")
    started = time.perf_counter()
    table = measure(names)
    gaps = [value for row in table.values() for value in row.values() if isinstance(value, float)]
    good = max(gaps) < TOLERANCE and all(row["round trip"] is True for row in table.values())
    same = sum(row["round trip"] is True for row in table.values())
    verdict = (
        f"{len(table)} models, {len(gaps)} comparisons: largest difference of a token's log-probability "
        f"{max(gaps):.1e} (tolerance {TOLERANCE:.0e}), {same} round trips to the same bytes"
    )
    print(f"{verdict}; {time.perf_counter() - started:.0f} s")
    if not args.only:
        write(args.output, table, verdict, machine())
    return 0 if good else 1


def write(folder: Path, table: dict[str, dict[str, Any]], verdict: str, facts: dict[str, str]) -> None:
    """``family_parity.json`` and ``.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {**facts, "tolerance": TOLERANCE, "largest_difference": table}
    (folder / "family_parity.json").write_text(json.dumps(data, indent=1) + "\n")
    columns = list(next(iter(table.values())))
    rows = [f"| {name} | " + " | ".join(_cell(row[column]) for column in columns) + " |" for name, row in table.items()]
    text = [
        "# Families against transformers",
        "",
        "`make parity`: random weights, norms and biases included, in fp32. Each number is the largest difference of",
        "a token's log-probability; the round trip is import and export, tensors and configurations. The models are",
        "those of `tests/hf_examples.py`.",
        "",
        f"{verdict}. " + ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *rows,
        "",
    ]
    (folder / "family_parity.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
