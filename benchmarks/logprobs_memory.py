"""Memory of the log-probabilities of chosen tokens: in chunks, against the logits of all tokens at once.

    python benchmarks/logprobs_memory.py [--dtype fp32] [--vocab-sizes 32768 131072] [--tokens 512 1024 2048 4096 8192]

Counts peak bytes allocated by tensors in the scoring pass (no gradient) and in forward and backward, for
``mcore/passes/logprobs.py`` and for ``(hidden @ weight.T).float().log_softmax().gather()``. Inputs are not counted,
their gradients are. Writes benchmarks/results/logprobs_memory.{json,md,png}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from allocations import allocations
from bench_output import BLUE, GREEN, MIB, ORANGE, machine_lines, mebibytes, write_figure, write_text
from matplotlib.figure import Figure
from record import RESULTS, machine
from torch import Tensor

from megatron_groupdpo.entry import run_entry
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Peak bytes at one size."""

    dtype: str
    vocab_size: int
    num_tokens: int
    scoring: int
    """Ours, without gradient."""
    ours: int
    """Ours, forward and backward."""
    limit: int
    """What ours cannot go below: see :func:`lower_limit`."""
    naive: int
    """All logits at once, forward and backward; by formula where not ``naive_measured``."""
    naive_measured: bool


def main() -> None:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU, and there is none; set --device cpu")
    command = "python benchmarks/logprobs_memory.py " + " ".join(sys.argv[1:])
    record = {
        "command": command.strip(),
        "machine": machine(args.device),
        "hidden_size": args.hidden_size,
        "chunk_size": args.chunk_size,
        "device": args.device,
    }
    rows = measure_all(args)
    page = markdown(rows, record)
    print(page)
    write_text(args.output / "logprobs_memory.json", json.dumps(record | {"rows": list(map(dataclasses.asdict, rows))}))
    write_text(args.output / "logprobs_memory.md", page)
    write_figure(args.output / "logprobs_memory.png", figure(rows, args.chunk_size))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"], help="of hidden states and weight")
    add("--vocab-sizes", type=int, nargs="+", default=[32768, 131072], help="rows of the weight (%(default)s)")
    add("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="response tokens (%(default)s)")
    add("--hidden-size", type=int, default=64, help="width of the hidden states (%(default)s)")
    add("--chunk-size", type=int, default=1024, help="--log-probs-chunk-size, the package's default (%(default)s)")
    add("--naive-limit", type=float, default=4.0, help="GiB above which the naive form is not run (%(default)s)")
    add("--output", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    return parser.parse_args()


def measure_all(args: argparse.Namespace) -> list[Row]:
    sizes = [(d, v, t) for d in args.dtype for v in sorted(args.vocab_sizes) for t in sorted(args.tokens)]
    total, done, start = sum(v * t for _, v, t in sizes), 0, time.monotonic()
    rows = []
    for dtype, vocab_size, num_tokens in sizes:
        rows.append(measure(dtype, vocab_size, num_tokens, args))
        done += vocab_size * num_tokens
        elapsed = time.monotonic() - start
        print(
            f"[{done / total:4.0%}, {elapsed:.0f} s, about {elapsed * (total / done - 1):.0f} s left] "
            f"{dtype}, vocabulary {vocab_size}, {num_tokens} tokens",
            file=sys.stderr,
            flush=True,
        )
    return rows


def measure(dtype: str, vocab_size: int, num_tokens: int, args: argparse.Namespace) -> Row:
    draw = torch.Generator().manual_seed(0)

    def leaf(rows: int) -> Tensor:
        values = torch.randn(rows, args.hidden_size, generator=draw)
        return values.to(args.device, DTYPES[dtype]).requires_grad_()

    hidden_TH, weight_VH = leaf(num_tokens), leaf(vocab_size)
    targets_T = torch.randint(0, vocab_size, (num_tokens,), generator=draw).to(args.device)

    def ours(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
        return selected_logprobs(hidden_TH, weight_VH, targets_T, vocab_size=vocab_size, chunk_size=args.chunk_size)

    def peak(work: Callable[[], Any]) -> int:
        return allocations(work, device=args.device).peak

    def both(logprobs: LogProbs) -> Callable[[], None]:
        def work() -> None:
            logprobs(hidden_TH, weight_VH, targets_T).sum().backward()
            hidden_TH.grad = weight_VH.grad = None

        return work

    scoring = torch.no_grad()(lambda: ours(hidden_TH, weight_VH, targets_T))
    # logits, their log_softmax and its gradient, with the gradient of gather in place of the logits, which are gone
    naive_bytes = 3 * num_tokens * vocab_size * 4
    run_naive = naive_bytes <= args.naive_limit * 2**30
    return Row(
        dtype=dtype,
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        scoring=peak(scoring),
        ours=peak(both(ours)),
        limit=lower_limit(num_tokens, vocab_size, args.hidden_size, args.chunk_size, DTYPES[dtype].itemsize),
        naive=peak(both(naive)) if run_naive else naive_bytes,
        naive_measured=run_naive,
    )


def naive(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    return (hidden_TH @ weight_VH.t()).float().log_softmax(-1).gather(1, targets_T[:, None]).squeeze(1)


def lower_limit(num_tokens: int, vocab_size: int, hidden_size: int, chunk_size: int, item: int) -> int:
    """Bytes of what a chunked backward must hold: one chunk of fp32 logits, and both gradients in their dtype."""
    return min(num_tokens, chunk_size) * vocab_size * 4 + (num_tokens + vocab_size) * hidden_size * item


def markdown(rows: Sequence[Row], record: dict[str, Any]) -> str:
    how = (
        "Peak bytes in `torch.cuda.max_memory_allocated`"
        if record["device"] == "cuda"
        else "Peak bytes of PyTorch's CPU allocator, every allocation and release counted (exact; what the matrix "
        "library keeps for itself is not in it)"
    )
    lines = [
        "# Memory of selected log-probabilities",
        "",
        f"`{record['command']}`",
        "",
        f"{how}, beyond the inputs: hidden states [tokens, {record['hidden_size']}] and weight "
        f"[vocabulary, {record['hidden_size']}]. Chunks of {record['chunk_size']} tokens. The floor is one chunk of "
        "fp32 logits and the two gradients; in bf16 the matrix product stands beside its fp32 copy while that is made, "
        "and the weight's gradient is summed in fp32. Naive: logits of all tokens, `log_softmax`, `gather`; in "
        "brackets where it was not run, 3 x tokens x vocabulary x 4 bytes, which is what it takes where it was.",
        "",
        "| dtype | vocabulary | tokens | scoring pass (MiB) | forward + backward (MiB) | floor (MiB) | naive (MiB) | "
        "naive / ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        naive_cell = mebibytes(row.naive) if row.naive_measured else f"({mebibytes(row.naive)})"
        cells = [row.dtype, f"{row.vocab_size:,}", f"{row.num_tokens:,}", mebibytes(row.scoring), mebibytes(row.ours)]
        cells += [mebibytes(row.limit), naive_cell, f"{row.naive / row.ours:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *machine_lines(record["machine"])]) + "\n"


def figure(rows: Sequence[Row], chunk_size: int) -> Figure:
    """A panel per vocabulary, tokens against MiB; full lines fp32, dashed bf16."""
    vocabularies = sorted({row.vocab_size for row in rows})
    picture = Figure(figsize=(4.2 * len(vocabularies) + 0.4, 4.0), layout="constrained")
    axes = picture.subplots(1, len(vocabularies), sharey=True, squeeze=False)[0]
    for panel, vocab_size in zip(axes, vocabularies):
        for dtype, style in zip(DTYPES, ("-", "--")):
            found = [row for row in rows if (row.vocab_size, row.dtype) == (vocab_size, dtype)]
            tokens = [row.num_tokens for row in found]
            for name, colour in (("naive", ORANGE), ("ours", BLUE), ("scoring", GREEN)):
                sizes = [getattr(row, name) / MIB for row in found]
                label = {"naive": "naive", "ours": "in chunks", "scoring": "in chunks, scoring pass"}[name]
                panel.plot(tokens, sizes, style, color=colour, linewidth=1.4, label=f"{label}, {dtype}")
                measured = [name != "naive" or row.naive_measured for row in found]
                for at, size, filled in zip(tokens, sizes, measured):
                    panel.plot(at, size, "o", color=colour, markersize=4, markerfacecolor=colour if filled else "white")
        panel.axvline(chunk_size, color="0.6", linewidth=0.8, zorder=0)
        panel.text(chunk_size * 1.05, 0.97, "chunk size", transform=panel.get_xaxis_transform(), fontsize=7, va="top")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        every = sorted({row.num_tokens for row in rows})
        panel.set_xticks(every, [str(at) for at in every])
        panel.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
        panel.minorticks_off()
        panel.set_title(f"vocabulary {vocab_size:,}", fontsize=10)
        panel.set_xlabel("response tokens", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("peak MiB beyond the inputs")
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    picture.suptitle("Log-probabilities of chosen tokens (hollow: by formula)", fontsize=11)
    return picture


if __name__ == "__main__":
    run_entry(main)
