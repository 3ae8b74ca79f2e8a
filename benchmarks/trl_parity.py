"""GroupDPO at one positive and one negative against TRL's DPOTrainer: loss, log-probabilities, rewards, every gradient.

    EXTRAS=dev,bench tools/setup.sh
    .venv/bin/python benchmarks/trl_parity.py

Both sides read the same texts, tokenizer and random Hugging Face models (a small Llama and a small GPT-2, a reference
for each), in fp32 on the CPU. TRL makes one step of `DPOTrainer.train()`; its gradient is read before the optimizer
uses it. This package makes a token store of the texts, imports the weights into Megatron-Core, scores the reference and
runs its two passes; the gradient is split into the Hugging Face tensors. The problem is in
tests/harness/pair_problem.py.

Writes benchmarks/results/trl_parity.json and .md, and ends with 1 when a difference is over its tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from demo_seeds import machine
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests" / "harness"))

import pair_compare  # noqa: E402
import pair_problem  # noqa: E402
from pair_compare import TOLERANCES, Numbers  # noqa: E402
from pair_problem import LOSS, MODELS, VARIANTS, ProblemFiles, Variant  # noqa: E402
from rank_pool import RankPool  # noqa: E402

METRICS = ("logps/chosen", "logps/rejected", "rewards/accuracies")
REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    model: str
    variant: str
    trl: str
    ours: str
    note: str
    loss: float
    """TRL's."""
    gradient_norm: float
    """TRL's."""
    differences: Mapping[str, float]
    worst_tensor: str
    """Where the entry of the gradient is that differs most."""
    over_tolerance: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-golden", action="store_true", help="also write tests/golden/trl_dpo.json, for CI")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("error: TRL is not installed; run EXTRAS=dev,bench tools/setup.sh", file=sys.stderr)
        return 1
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        files = pair_problem.write_problem(Path(folder))
        rows, golden = compare_all(files)
        checksums = pair_problem.checksums(files)
    about = {**machine(), **{name: version(name) for name in ("trl", "accelerate")}}
    write_results(args.output, about, rows)
    failed = [row for row in rows if row.over_tolerance]
    for row in failed:
        print(
            f"over tolerance: {row.model}, {row.variant}, {row.ours}: {', '.join(row.over_tolerance)}", file=sys.stderr
        )
    if args.write_golden and not failed:
        problem = {"checksums": checksums, "settings": pair_problem.problem_settings()}
        pair_compare.write_golden(about, problem, golden)
    return 1 if failed else 0


def quiet() -> None:
    """No progress bars or advice of the libraries between the lines of this command."""
    import datasets
    import transformers

    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def compare_all(files: ProblemFiles) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Every variant on its models: the rows, and TRL's numbers in the golden file's form."""
    from trl_side import trl_numbers

    rows: list[Row] = []
    golden: dict[str, dict[str, Any]] = {model: {} for model in MODELS}
    cases = [(model, variant) for model in MODELS for variant in VARIANTS if model in variant.models]
    pool = RankPool(1)
    try:
        for model, variant in tqdm(cases, desc="comparisons", unit="case"):
            trl = trl_numbers(files, model, variant)
            golden[model][variant.name] = pair_compare.golden_form(trl.numbers)
            rows += compare(pool, files, model, variant, trl.numbers, trl.metrics)
    finally:
        pool.close()
    return rows, golden


def compare(
    pool: RankPool, files: ProblemFiles, model: str, variant: Variant, trl: Numbers, trl_metrics: Mapping[str, float]
) -> list[Row]:
    """A row per objective that is to give these numbers."""
    from pair_run import PairJob, numbers_of, run_pairs

    losses = tuple(variant.losses())
    job = PairJob(files=files, model=model, losses=losses)
    (results,) = pool.run(1, run_pairs, job)
    # Under an averaged score our rewards are the averages, TRL's the sums.
    names = METRICS if variant.ours.get("score_average") else (*METRICS, *REWARD_METRICS)
    rows = []
    for loss, result in zip(losses, results, strict=True):
        differences, worst = pair_compare.differences(numbers_of(job, [result]), trl)
        differences["metrics"] = pair_compare.metric_gap(result.metrics, trl_metrics, names)
        rows.append(
            Row(
                model=model,
                variant=variant.name,
                trl=describe_trl(variant),
                ours=describe_ours(loss),
                note=variant.note,
                loss=trl.loss,
                gradient_norm=pair_compare.total_norm(trl.gradient),
                differences=differences,
                worst_tensor=worst,
                over_tolerance=pair_compare.too_large(differences),
            )
        )
    return rows


def describe_trl(variant: Variant) -> str:
    """As ``loss_type`` reads; a sum of runs with their factors."""
    names = ["+".join(options["loss_type"]) for _, options in variant.trl]
    if len(names) == 1:
        return names[0] if variant.pairs_per_batch > 1 else f"{names[0]}, one pair a batch"
    return " ".join(f"{factor:+.3g}*{name}" for (factor, _), name in zip(variant.trl, names))


def describe_ours(loss: Mapping[str, Any]) -> str:
    """The flags that differ from plain ``dpo``."""
    words = [str(loss.get("objective", LOSS["objective"]))]
    words += ["--score-average"] * bool(loss.get("score_average"))
    if loss.get("nll_coeff"):
        words.append(f"--nll-coeff {loss['nll_coeff']} --nll-average {loss['nll_average']}")
    own = {name: value for name, value in loss.get("hyperparameters", {}).items() if name != "beta"}
    return " ".join([*words, *(f"--{name.replace('_', '-')} {value:g}" for name, value in own.items())])


def write_results(folder: Path, about: Mapping[str, str], rows: list[Row]) -> None:
    text = markdown(about, rows)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "tolerances": TOLERANCES, "rows": [asdict(row) for row in rows]}
    for name, contents in (("trl_parity.json", json.dumps(record, indent=1) + "\n"), ("trl_parity.md", text)):
        partial = folder / f"{name}.part"
        partial.write_text(contents, encoding="utf-8")
        partial.replace(folder / name)


def markdown(about: Mapping[str, str], rows: list[Row]) -> str:
    """One line per variant, with the largest differences of its objectives."""
    shown = tuple(TOLERANCES)
    lines = [
        "# GroupDPO at N = 2 and TRL's DPOTrainer",
        "",
        f"`benchmarks/trl_parity.py`: {pair_problem.NUM_PAIRS} ragged pairs, beta {pair_problem.BETA}, fp32, CPU.",
        "Differences: loss relative; log-probabilities, rewards and logged metrics absolute; gradient",
        "||difference|| / ||gradient|| over all tensors; worst entry of a gradient relative to the largest entry.",
        "",
        "| model | TRL `loss_type` | here | " + " | ".join(shown) + " | |",
        "|---|---|---|" + "---|" * (len(shown) + 1),
    ]
    for _, group in groupby(rows, key=lambda row: (row.model, row.variant)):
        first, *others = group
        ours = ", ".join([first.ours, *(row.ours.split()[0] for row in others)])
        over = sorted({name for row in (first, *others) for name in row.over_tolerance})
        verdict = f"OVER: {', '.join(over)}" if over else first.note
        lines.append(f"| {first.model} | {first.trl} | {ours} | {_largest([first, *others], shown)} | {verdict} |")
    allowed = " | ".join(f"{TOLERANCES[name]:.0e}" for name in shown)
    lines += [f"| all | largest | | {_largest(rows, shown)} | |", f"| all | tolerance | | {allowed} | |", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    return "\n".join(lines) + "\n"


def _largest(rows: list[Row], names: tuple[str, ...]) -> str:
    return " | ".join(f"{max(row.differences[name] for row in rows):.1e}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
