"""A million groups preprocessed, killed, resumed, opened and sampled; ten million groups opened.

    python benchmarks/store_scale.py [--groups 1000000] [--dir FOLDER]

The million goes through tools/preprocess_data.py (short texts, SentencePiece); the ten million through the store writer
alone. Writes benchmarks/results/store_scale.json and .md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sentencepiece
from demo_seeds import RESULTS, ROOT, machine

OPEN = """
import json, resource, sys, time
import numpy as np
from megatron_groupdpo.data.store.reader import GroupDataset, split_by_prompt
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.data.store.reader import TokenStore
def own_mb():  # without the pages of mapped files, which the system takes back at will
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024, int(fields["VmRSS"].split()[0]) / 1024
path, num_reads = sys.argv[1], int(sys.argv[2])
(own, rss), result = own_mb(), {}
def step(name, work):
    started = time.perf_counter()
    out = work()
    seconds, (now, now_rss) = time.perf_counter() - started, own_mb()
    result[name] = {"seconds": round(seconds, 3), "own_mb": round(now - own, 1), "resident_mb": round(now_rss - rss, 1)}
    return out
dataset = step("open", lambda: GroupDataset.open([path]))
assert dataset.longest_row > 0
train, held_out = step("split by prompt", lambda: split_by_prompt(dataset, 0.01))
sampler = GroupSampler(len(dataset), seed=1)
first = step("first sample of an epoch", lambda: sampler.take(0, 1))
taken = sampler.take(1, num_reads)
tokens = step(f"read {num_reads:,} groups at random", lambda: sum(len(dataset[i].prompt_tokens) for i, _ in taken))
result["groups"], result["held_out"] = len(dataset), len(held_out)
print(json.dumps(result))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1_000_000, help="groups that are preprocessed (1000000)")
    parser.add_argument("--opened", type=int, default=10_000_000, help="groups of the store that is opened (10000000)")
    parser.add_argument("--dir", type=Path, help="where to work; needs about 4 GB (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        work = Path(folder)
        record = {"machine": machine(), "preprocess": preprocess_and_resume(work, args.groups)}
        record["million"] = in_new_process(work / "whole.store", 20_000)
        shutil.rmtree(work / "whole.store")
        started = time.perf_counter()
        write_store(work / "large.store", args.opened)
        record["ten million"] = in_new_process(work / "large.store", 20_000)
        record["ten million"]["written in seconds"] = round(time.perf_counter() - started, 1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "store_scale.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "store_scale.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


def preprocess_and_resume(work: Path, num_groups: int) -> dict[str, Any]:
    """One build in peace, one killed half-way and resumed; their stores must be equal."""
    source, model = work / "groups.jsonl", work / "sp.model"
    write_groups(source, num_groups)
    train_tokenizer(model)

    def command(output: str) -> list[str]:
        return [
            sys.executable, str(ROOT / "tools/preprocess_data.py"),
            "--input", str(source), "--output", str(work / output),
            "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model), "--seq-length", "64",
        ]  # fmt: skip

    whole = watch(command("whole.store"))
    killed = watch(command("resumed.store"), kill_after=0.6 * whole["seconds"])
    assert killed["exit status"] == -signal.SIGKILL
    assert not (work / "resumed.store").exists()
    resumed = watch(command("resumed.store"))
    digests = [
        json.loads((work / name / "meta.json").read_text())["digest"] for name in ("whole.store", "resumed.store")
    ]
    assert digests[0] == digests[1], "the resumed store differs"
    assert same_files(work / "whole.store", work / "resumed.store")
    meta = json.loads((work / "whole.store" / "meta.json").read_text())
    assert meta["num_groups"] == num_groups
    shutil.rmtree(work / "resumed.store")
    return {
        "groups": num_groups,
        "tokens": meta["num_tokens"],
        "input_mb": round(source.stat().st_size / 2**20),
        "store_mb": round(sum(entry["bytes"] for entry in meta["files"].values()) / 2**20),
        "whole": whole,
        "killed": killed,
        "resumed": resumed,
    }


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def watch(command: list[str], kill_after: float | None = None) -> dict[str, Any]:
    """Run a command, perhaps kill it after some seconds; its time and its largest memory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = psutil.Process(process.pid)
    while True:
        try:
            status = process.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, seen.memory_info().rss)
        if kill_after is not None and time.perf_counter() - started > kill_after:
            process.kill()
    seconds = time.perf_counter() - started
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    assert status in (0, -signal.SIGKILL), errors
    note = next((line for line in errors.splitlines() if "interrupted" in line), "")
    return {"exit status": status, "seconds": round(seconds, 1), "peak_mb": round(peak / 2**20), "note": note}


def in_new_process(store: Path, num_reads: int) -> dict[str, Any]:
    """Open, split and sample in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", OPEN, str(store), str(num_reads)]
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def write_groups(path: Path, num_groups: int) -> None:
    """Short sums, one right answer and two wrong ones."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(num_groups):
            a, b = draw.randrange(1000), draw.randrange(1000)
            answers = [(a + b, 1), (a + b + 1, -1), (a + b - 10, -1)]
            responses = [{"text": f"It is {answer}.", "label": label} for answer, label in answers]
            stream.write(json.dumps({"prompt": f"{number}: {a} plus {b}?", "responses": responses}) + "\n")


def train_tokenizer(path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{i}: {i % 997} plus {i % 991}? It is {i}." for i in range(0, 100_000, 37)),
        model_writer=model, model_type="bpe", vocab_size=2000, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=9,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def write_store(path: Path, num_groups: int) -> None:
    """Groups of 2 responses through the store writer, a block of many at once."""
    from megatron_groupdpo.data.preprocess.work_folder import whole_folder
    from megatron_groupdpo.data.store.writer import GroupBlock, StoreIdentity, StoreWriter

    identity = StoreIdentity(tokenizer={"digest": "none", "vocab_size": 50_000}, options={})
    with whole_folder(path, overwrite=False) as folder:
        writer = StoreWriter(folder, identity)
        draw = np.random.default_rng(1)
        for start in range(0, num_groups, 100_000):
            size = min(100_000, num_groups - start)
            prompts, responses = draw.integers(2, 8, size), draw.integers(2, 8, 2 * size)
            block = GroupBlock(
                tokens=draw.integers(0, 50_000, prompts.sum() + responses.sum(), dtype=np.int32),
                prompt_lengths_G=prompts.astype(np.int32),
                num_responses_G=np.full(size, 2),
                source_rows_G=np.arange(start, start + size),
                prompt_keys_G=draw.integers(0, 2**32, size, dtype=np.uint32),
                response_lengths_R=responses.astype(np.int32),
                labels_R=np.tile(np.array([1, -1], dtype=np.int8), size),
                values_R=draw.random(2 * size, dtype=np.float32),
                ref_logps_R=np.full(2 * size, np.nan),
                is_masked_R=np.zeros(2 * size, dtype=bool),
                masks=np.empty(0, dtype=np.uint8),
            )
            writer.add_block(block, 0)
        writer.finish(sources=[{"path": "synthetic", "schema": "none"}], counts=[])


def markdown(record: dict[str, Any]) -> str:
    made = record["preprocess"]
    lines = [
        "# Stores of a million and of ten million groups",
        "",
        f"`python benchmarks/store_scale.py`: {made['groups']:,} groups of 3 responses, {made['tokens']:,} tokens, "
        f"{made['input_mb']} MB of JSON Lines, {made['store_mb']} MB of store; "
        "`tools/preprocess_data.py` with 1 worker.",
        "",
        "| run | seconds | largest memory, MB |",
        "|---|---|---|",
        *(f"| {name} | {made[name]['seconds']} | {made[name]['peak_mb']} |" for name in ("whole", "killed", "resumed")),
        "",
        f"The resumed run said: {made['resumed']['note']}. Its store is the whole run's, byte for byte.",
        "",
        "Opened in a new process: seconds, the growth of its own memory, and of all that is resident with the pages of "
        "mapped files, after each step.",
        "",
        "| step | 1: seconds | own MB | resident MB | 10: seconds | own MB | resident MB |",
        "|---|---|---|---|---|---|---|",
    ]
    million, large = record["million"], record["ten million"]
    for step in [key for key, value in million.items() if isinstance(value, dict)]:
        cells = [f"{part[step][key]}" for part in (million, large) for key in ("seconds", "own_mb", "resident_mb")]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"1: {million['groups']:,} groups, preprocessed. 10: {large['groups']:,} groups of 2 responses, "
        "through the store writer.",
        "",
        *(f"- {key}: {value}" for key, value in record["machine"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
