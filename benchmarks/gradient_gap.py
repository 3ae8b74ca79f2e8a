"""What a run's proofs measure on the CPU: gradient gap, score drift and step 0, by precision, layout and objective.

    python benchmarks/gradient_gap.py

Trains a few iterations of Llama- and GPT-2-like models, from a reference scored by one rank, with
``--verify-gradients``. Each run is `torchrun -m megatron_groupdpo.train`. Writes
benchmarks/results/gradient_gap.{json,md}. About 8 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from bench_output import machine_lines, write_text
from record import RESULTS, ROOT, machine

ITERATIONS, GROUPS, RESPONSES = 4, 24, 7
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "make_vocab_size_divisible_by": 8,
}
LLAMA = {
    "num_query_groups": 2,
    "ffn_hidden_size": 352,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama, 4 layers": SIZES | LLAMA | {"num_layers": 4},
    "llama, 8 layers": SIZES | LLAMA | {"num_layers": 8},
    "gpt2, 4 layers": SIZES | {"num_layers": 4, "position_embedding_type": "learned_absolute"},
}
PADDED, PACKED = {"micro_batch_size": 2}, {"max_tokens_per_microbatch": 1024}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, PADDED),
    "one rank, packed": (1, {}, PACKED),
    "TP2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, PADDED),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, PADDED),
    "DP2": (2, {}, PADDED),
    "CP2, packed": (2, {"context_parallel_size": 2}, PACKED),
}
OBJECTIVES = ("all_pairs", "softmax", "margin", "group_bce")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = prepare(folder)
        cases = [(model, layout, OBJECTIVES[0]) for model in MODELS for layout in LAYOUTS]
        cases += [(next(iter(MODELS)), "one rank", objective) for objective in OBJECTIVES[1:]]
        for precision in ("fp32", "bf16"):
            for model in MODELS:
                warm_up(folder, store, model, precision)
            for model, layout, objective in cases:
                rows.append(measure(folder, store, model, layout, objective, precision))
                done = len(rows) / (2 * len(cases))
                spent = time.monotonic() - began
                print(f"{json.dumps(rows[-1])}  {done:.0%}, {spent * (1 - done) / done:.0f} s to go", flush=True)
    record = {"machine": machine(), "iterations": ITERATIONS, "rows": rows}
    write_text(RESULTS / "gradient_gap.json", json.dumps(record, indent=1) + "\n")
    write_text(RESULTS / "gradient_gap.md", markdown(record))
    print(markdown(record))


def prepare(folder: Path) -> Path:
    """Groups of made-up sentences, three positives and four negatives of about 150 tokens each; their token store."""
    import sentencepiece

    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(400)]

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(longest // 2, longest)))

    records = [
        {"prompt": text(20), "responses": [{"text": text(120), "label": 1 if k < 3 else -1} for k in range(RESPONSES)]}
        for _ in range(GROUPS)
    ]
    (folder / "groups.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / "text").write_text("\n".join(text(60) for _ in range(2000)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=512, byte_fallback=True, minloglevel=2
    )
    run(
        1, "tools/preprocess_data.py", "--input", folder / "groups.jsonl", "--output", folder / "store", "--seq-length",
        256, "--length-policy", "truncate-response", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model",
        folder / "sp.model",
    )  # fmt: skip
    return folder / "store"


def warm_up(folder: Path, store: Path, model: str, precision: str) -> None:
    """A few steps on the positives, and the reference scored from where they lead, on one rank."""
    base = folder / model / precision
    config = configuration(model, store, precision, {}, PADDED)
    config["objective"] = {"objective": "sft", "reference": "none"}
    config["checkpoint"] = {"save": str(base / "warm")}
    train(base / "warm.yaml", 1, config)
    flags = ("--bf16",) if precision == "bf16" else ()
    run(1, "tools/score_reference.py", "--load", base / "warm", "--data-path", store, "--output", base / "ref", *flags)


def measure(folder: Path, store: Path, model: str, layout: str, objective: str, precision: str) -> dict[str, Any]:
    """One run's largest gap and drift, and what it says of step 0."""
    base = folder / model / precision
    num_ranks, parallel, microbatches = LAYOUTS[layout]
    config = configuration(model, store, precision, parallel, microbatches)
    save = base / f"{layout} {objective}"
    config["objective"] = {"objective": objective, "reference": "cached", "reference_logprobs": str(base / "ref")}
    config["training"]["verify_gradients"] = ITERATIONS
    config["checkpoint"] = {"save": str(save), "pretrained_checkpoint": str(base / "warm")}
    output = train(base / f"{layout} {objective}.yaml", num_ranks, config)
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step0 = re.search(
        r"step 0: .*?, (\S+) per token; preference loss (\S+), closed form (\S+), tolerance (\S+)", output
    )
    assert step0, output[-2000:]
    per_token, loss, closed_form, tolerance = map(float, step0.groups())
    return {
        "precision": precision,
        "model": model,
        "layout": layout,
        "objective": objective,
        "gradient_gap": max(line["gradient_gap"] for line in lines),
        "score_drift": None if lines[0]["score_drift"] is None else max(line["score_drift"] for line in lines),
        "step0_per_token": per_token,
        "step0_loss_of_tolerance": abs(loss - closed_form) / tolerance,
    }


def configuration(
    model: str, store: Path, precision: str, parallel: dict[str, Any], microbatches: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": MODELS[model],
        "parallel": {"device": "cpu"} | parallel,
        "data": {"data_path": [str(store)], "seq_length": 256, "num_workers": 0},
        "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        "precision": {"bf16": precision == "bf16"},
        "training": {"global_batch_size": 4, "train_iters": ITERATIONS} | microbatches,
    }


def train(path: Path, num_ranks: int, config: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return run(num_ranks, "-m", "megatron_groupdpo.train", "--config", path)


def run(num_ranks: int, *words: object) -> str:
    """The command's output; its failure is this benchmark's."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, *map(str, words)], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def markdown(record: dict[str, Any]) -> str:
    """A table of all runs."""
    lines = [
        "# What a run's proofs measure",
        "",
        f"Largest of {record['iterations']} iterations; groups of {RESPONSES} responses of about 150 tokens, "
        "width 128; the reference was scored by one rank, padded. `python benchmarks/gradient_gap.py`.",
        "",
        "| precision | model | layout | objective | gradient gap | score drift | step 0, per token | step 0, loss "
        "/ its tolerance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        drift = "no pass" if row["score_drift"] is None else f"{row['score_drift']:.1e}"
        lines.append(
            f"| {row['precision']} | {row['model']} | {row['layout']} | {row['objective']} | {row['gradient_gap']:.1e} "
            f"| {drift} | {row['step0_per_token']:.1e} | {row['step0_loss_of_tolerance']:.2f} |"
        )
    return "\n".join([*lines, "", *machine_lines(record["machine"])]) + "\n"


if __name__ == "__main__":
    main()
