"""Preprocessing in tokens per second and core, against the tokenizer's own bare speed on the same texts.

    python benchmarks/preprocess_throughput.py [--input groups.jsonl] [--repeat 10]

Both are measured in one run, for SentencePiece and a fast Hugging Face tokenizer (trained on the spot), with 1 and
2 workers. Speed counts processor time, so that other work on the machine plays no part; wall time stands beside it.
Writes benchmarks/results/preprocess_throughput.json and .md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is one thread, bare and ours

import sentencepiece
import tokenizers
import transformers
from demo_seeds import RESULTS, ROOT, machine

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.files.reader import read_records
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.schemas import SchemaOptions, choose_schema
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions

VOCAB_SIZE = 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=ROOT.parent / "shared/data/alpaca_eval_groups.jsonl")
    parser.add_argument("--repeat", type=int, default=10, help="copies of the input in one measurement (10)")
    args = parser.parse_args()
    texts = texts_of(args.input) * args.repeat
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        many, one = work / "many.jsonl", work / "one.jsonl"
        one.write_bytes(args.input.read_bytes())
        many.write_bytes(args.input.read_bytes() * (args.repeat + 1))
        rows = []
        for name, options in (
            ("SentencePiece", sentencepiece_tokenizer(work, texts)),
            ("HF fast", hf_tokenizer(work, texts)),
        ):
            rows += measure(name, options, texts, many, one, work, args.repeat)
    record = {
        "machine": machine() | {name: version(name) for name in ("tokenizers", "sentencepiece")},
        "input": {"file": args.input.name, "copies": args.repeat, "texts": len(texts), "bytes": many_bytes(texts)},
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "preprocess_throughput.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "preprocess_throughput.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


def texts_of(path: Path) -> list[str]:
    """Prompts and responses, in the order in which preprocessing encodes them; blank ones it drops."""
    records = list(read_records(str(path)))
    schema = choose_schema("auto", records[:16])
    groups = [schema.parse(record, where, SchemaOptions()) for record, where in records]
    texts = [text for group in groups for text in (group.prompt, *(r.text for r in group.responses))]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def many_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def sentencepiece_tokenizer(work: Path, texts: list[str]) -> TokenizerOptions:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:2000]), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=9,
    )  # fmt: skip
    (work / "sp.model").write_bytes(model.getvalue())
    return TokenizerOptions(kind="SentencePieceTokenizer", model=str(work / "sp.model"))


def hf_tokenizer(work: Path, texts: list[str]) -> TokenizerOptions:
    """Byte-level BPE, as Llama-3 and Qwen use it."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["</s>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts[:2000], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(str(work / "hf"))
    return TokenizerOptions(kind="HuggingFaceTokenizer", model=str(work / "hf"))


def measure(
    name: str, tokenizer: TokenizerOptions, texts: list[str], many: Path, one: Path, work: Path, repeat: int
) -> list[dict[str, Any]]:
    """One row for each number of workers."""
    bare_seconds, num_tokens = bare(tokenizer, texts)
    # Every response stays, so both encode the same texts.
    options = PreprocessOptions(
        tokenizer=tokenizer,
        tokenize=TokenizeOptions(seq_length=1 << 20),
        partition=Partition(rule="rank", one_sided="keep", duplicates="keep"),
    )
    rows = []
    for workers in (1, 2):
        # The start varies from run to run, the first one most; the quicker of two stands for it.
        one_cpu = min(run(one, options, workers, work / f"{name}-{workers}-one{i}")[0] for i in range(2))
        cpu, wall, counts = run(many, options, workers, work / f"{name}-{workers}")
        assert counts[why.GROUPS_KEPT] == counts[why.GROUPS_READ]
        speed, bare_speed = num_tokens / (cpu - one_cpu), num_tokens / bare_seconds
        rows.append(
            {
                "tokenizer": name,
                "workers": workers,
                "tokens": num_tokens,
                "bare_tokens_per_second_core": round(bare_speed),
                "tokens_per_second_core": round(speed),
                "times_bare": round(bare_speed / speed, 3),
                "wall_seconds": round(wall, 2),
                "start_processor_seconds": round(one_cpu - (cpu - one_cpu) / repeat, 2),
            }
        )
        print(rows[-1])
    return rows


def bare(options: TokenizerOptions, texts: list[str]) -> tuple[float, int]:
    """Processor seconds and tokens of the library's own batch call, 1000 texts at a time, one thread."""
    if options.kind == "SentencePieceTokenizer":
        processor = sentencepiece.SentencePieceProcessor(model_file=options.model)
        encode = lambda batch: processor.encode(batch, num_threads=1)  # noqa: E731
    else:
        backend = tokenizers.Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
        encode = lambda batch: [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]  # noqa: E731
    started = time.process_time()
    num_tokens = sum(len(ids) for i in range(0, len(texts), 1000) for ids in encode(texts[i : i + 1000]))
    return time.process_time() - started, num_tokens


def run(source: Path, options: PreprocessOptions, workers: int, output: Path) -> tuple[float, float, Any]:
    """Processor seconds of this process and its workers, wall seconds, and the counts."""
    # Here, because worker processes import this file and need nothing of what this brings in.
    from megatron_groupdpo.data.preprocess.pipeline import preprocess

    cpu, wall = processor_seconds(), time.perf_counter()
    report = preprocess([str(source)], output, options, workers=workers)
    return processor_seconds() - cpu, time.perf_counter() - wall, report.counts


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def markdown(record: dict[str, Any]) -> str:
    given = record["input"]
    lines = [
        "# Preprocessing against the bare tokenizer",
        "",
        f"{given['copies']} copies of {given['file']}: {given['texts']:,} texts, {given['bytes']:,} bytes; "
        "`python benchmarks/preprocess_throughput.py`.",
        "Tokens per second of processor time of all processes together. The start (imports, tokenizer) is set apart: "
        "preprocessing is the difference of a run over one more copy and a run over one.",
        "",
        "| tokenizer | workers | tokens/s/core, bare | tokens/s/core, preprocessing | times bare | "
        "start, processor s | wall s, with the start |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['tokenizer']} | {row['workers']} | {row['bare_tokens_per_second_core']:,} | "
            f"{row['tokens_per_second_core']:,} | {row['times_bare']:.2f} | "
            f"{row['start_processor_seconds']:.1f} | {row['wall_seconds']:.1f} |"
        )
    lines += ["", *(f"- {key}: {value}" for key, value in record["machine"].items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
