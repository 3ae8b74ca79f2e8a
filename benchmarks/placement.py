"""Padding waste, balance and planning time: responses placed freely, against pairs and groups that must stay together.

    python benchmarks/placement.py --input GROUPS.jsonl [--partition topk --positives 8 --negatives 8]

Reads ragged groups (the results use 400 prompts with 16 responses each), trains a SentencePiece vocabulary on them,
plans global batches and counts, on every data-parallel rank, the tokens and the FLOPs of each microbatch. Writes
benchmarks/results/placement.{json,md}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, machine

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import Plan, PlanOptions, plan_batch, plan_units, plan_whole_groups
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.pipeline import preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.mcore.policy import resolved
from megatron_groupdpo.run.logs.flops import attention_cost, step_flops
from megatron_groupdpo.types import GroupBatch, ResponseRow

LLAMA_1B = ModelConfig(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    swiglu=True,
    add_bias_linear=False,
    normalization="RMSNorm",
    position_embedding_type="rope",
    vocab_size=128256,
)
PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 (NVIDIA's data sheet): no step can be faster than its FLOPs over this."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="group records")
    parser.add_argument("--global-batch-size", type=int, default=64, help="groups of a batch (64)")
    parser.add_argument("--data-parallel-size", type=int, default=8, help="ranks (8)")
    parser.add_argument("--seq-length", type=int, default=2048, help="longest prompt and response (2048)")
    args = parser.parse_args()
    model = resolved(LLAMA_1B)
    with tempfile.TemporaryDirectory() as folder:
        store = tokenized(args.input, Path(folder), args.seq_length)
        batches = batches_of(store, args.global_batch_size)
        rows = [
            measure(name, place, options, batches, model)
            for name, place, options in policies(args.data_parallel_size, args.seq_length, model)
        ]
    record = {"machine": machine(), "arguments": vars(args) | {"input": Path(args.input).name}, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "placement.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = markdown(record, batches)
    (RESULTS / "placement.md").write_text(text, encoding="utf-8")
    print(text)


def tokenized(source: str, folder: Path, seq_length: int) -> TokenStore:
    """A token store of the records, 8 best against 8 worst."""
    import sentencepiece

    with open(source, encoding="utf-8") as lines, (folder / "text").open("w", encoding="utf-8") as text:
        for line in lines:
            record = json.loads(line)
            text.writelines(part.replace("\n", " ") + "\n" for part in record["all_generated_responses"])
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "sp"),
        vocab_size=16000,
        byte_fallback=True,
        minloglevel=2,
        input_sentence_size=20000,
    )
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(kind="SentencePieceTokenizer", model=str(folder / "sp.model"), chat_template=None),
        tokenize=TokenizeOptions(seq_length=seq_length, length_policy="truncate-response"),
        partition=Partition(rule="topk", positives=8, negatives=8),
    )
    preprocess([source], folder / "store", options)
    return TokenStore.open(folder / "store")


def batches_of(store: TokenStore, num_groups: int) -> list[GroupBatch]:
    """Whole global batches, in a seeded order."""
    order = np.random.default_rng(0).permutation(len(store))
    return [
        build_batch(
            [store[int(group_id)] for group_id in order[start : start + num_groups]],
            group_keys_G=torch.zeros(num_groups, dtype=torch.int64),
            needs_pass=lambda given: given["labels_GK"] != 0,
        )
        for start in range(0, len(order) - num_groups + 1, num_groups)
    ]


Place = Callable[[GroupBatch, PlanOptions], Plan]


def policies(ranks: int, seq_length: int, model: ModelConfig) -> list[tuple[str, Place, PlanOptions]]:
    """What is compared: a name, how to place, and the layout."""
    cost = attention_cost(model)
    packed = PlanOptions(max_tokens_per_microbatch=2 * seq_length, data_parallel_size=ranks, attention_cost=cost)
    padded = PlanOptions(micro_batch_size=4, data_parallel_size=ranks, attention_cost=cost)
    by_count = {"attention_cost": 0.0}
    return [
        (f"responses packed to {2 * seq_length} tokens", plan_batch, packed),
        ("the same, balanced by tokens, not FLOPs", plan_batch, dataclasses.replace(packed, **by_count)),
        ("pairs packed, a pair in one microbatch", plan_pairs, packed),
        ("groups whole, each a packed microbatch", plan_whole_groups, packed),
        ("responses padded, 4 a microbatch", plan_batch, padded),
        ("pairs padded, 2 pairs a microbatch, in data order", plan_padded_pairs, padded),
        ("groups whole, each a padded microbatch", plan_whole_groups, padded),
    ]


def pairs_of(batch: GroupBatch) -> list[tuple[ResponseRow, ...]]:
    """Positive k with negative k of every group."""
    pairs = []
    for index_K, labels_K in zip(batch.flat_index_GK.tolist(), batch.labels_GK.tolist()):
        positives = [batch.rows[i] for i, label in zip(index_K, labels_K) if label > 0]
        negatives = [batch.rows[i] for i, label in zip(index_K, labels_K) if label < 0]
        pairs += list(zip(positives, negatives))
    return pairs


def plan_pairs(batch: GroupBatch, options: PlanOptions) -> Plan:
    """The same packer, with pairs as its units."""
    return plan_units(pairs_of(batch), options)


def plan_padded_pairs(batch: GroupBatch, options: PlanOptions) -> Plan:
    """Two pairs a microbatch in the order of the data, ranks in turn: what pairwise trainers do."""
    pairs = pairs_of(batch)
    filled = [(*one, *other) for one, other in zip(pairs[::2], pairs[1::2])]
    ranks = options.data_parallel_size
    rows = tuple(tuple(filled[rank::ranks]) for rank in range(ranks))
    return Plan(rows=rows, lengths=tuple(tuple(max(len(r.tokens_S) for r in m) for m in own) for own in rows))


def measure(name: str, place: Place, options: PlanOptions, batches: Sequence[GroupBatch], model: ModelConfig) -> dict:
    """Over all batches: padding, the busiest rank against the mean, microbatches, and the planner's time."""
    real = processed = 0
    imbalance, microbatches, seconds, share, build = [], [], [], [], []
    cost = attention_cost(model)
    for batch in batches:
        started = time.process_time()
        plan = place(batch, options)
        seconds.append(time.process_time() - started)
        started = time.process_time()
        build_microbatches(plan, options, rank=0)
        build.append(time.process_time() - started)
        loads = []
        for own, lengths in zip(plan.rows, plan.lengths):
            real += sum(len(row.tokens_S) for rows in own for row in rows)
            processed += sum(length * (1 if options.packed else len(rows)) for rows, length in zip(own, lengths))
            loads.append(sum(work(rows, length, options, cost) for rows, length in zip(own, lengths)))
        imbalance.append(max(loads) * len(loads) / sum(loads))
        microbatches.append(plan.num_microbatches)
        fastest = step_flops(model, batch, scoring_pass=True) / options.data_parallel_size / PEAK_FLOPS
        share.append((seconds[-1] + build[-1]) / fastest)
    return {
        "policy": name,
        "padding": 1 - real / processed,
        "max_over_mean": float(np.mean(imbalance)),
        "worst_max_over_mean": float(np.max(imbalance)),
        "microbatches": float(np.mean(microbatches)),
        "plan_ms": 1000 * float(np.median(seconds)),
        "build_ms": 1000 * float(np.median(build)),
        "share_of_fastest_step": float(np.median(share)),
    }


def work(rows: Sequence[ResponseRow], length: int, options: PlanOptions, cost: float) -> float:
    """FLOPs of a microbatch in token units, padding included."""
    if options.packed:
        return sum(len(row.tokens_S) * (1 + cost * len(row.tokens_S)) for row in rows)
    return len(rows) * length * (1 + cost * length)


def markdown(record: dict, batches: Sequence[GroupBatch]) -> str:
    args, facts = record["arguments"], record["machine"]
    lengths = np.array([len(row.tokens_S) for batch in batches for row in batch.rows])
    lines = [
        "# Placement of responses",
        "",
        f"`benchmarks/placement.py --input {args['input']}`: {len(batches)} batches of {args['global_batch_size']} "
        f"groups with {len(lengths) / len(batches) / args['global_batch_size']:.1f} responses on "
        f"{args['data_parallel_size']} data-parallel ranks; prompt and response {np.median(lengths):.0f} tokens "
        f"(median), {lengths.max()} (longest).",
        "FLOPs are those of a 1B Llama shape. Padding: share of processed tokens that are padding. Load: FLOPs of the",
        "busiest rank over the mean, mean and worst batch. The last column is planning and tensor building",
        "(processor time) over the shortest time the step can take at an H200's peak of 989 TFLOP/s in bf16, scoring",
        "pass included.",
        "",
        "| placement | padding | load max/mean | worst | microbatches a rank | plan | build | of the fastest step |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['policy']} | {r['padding']:.1%} | {r['max_over_mean']:.3f} | {r['worst_max_over_mean']:.3f} | "
            f"{r['microbatches']:.1f} | {r['plan_ms']:.1f} ms | {r['build_ms']:.1f} ms | "
            f"{r['share_of_fastest_step']:.2%} |"
            for r in record["rows"]
        ),
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
