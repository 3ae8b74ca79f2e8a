"""What the machine gives: rate of matrix products and of copies, the limits that measured times are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_context import Context


def measure_rates(context: Context) -> Iterator[dict[str, Any]]:
    """FLOP/s of square matrix products on random numbers, and bytes/s (read and written) of a copy.

    Zeros would run faster (fewer bits switch). Several input sets, together larger than any cache, take turns.
    """
    size = context.pick(8192, 64)
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        sets = [
            [torch.randn(size, size, device=context.device).to(dtype) for _ in range(2)]
            for _ in range(context.pick(4, 2))
        ]
        out = torch.empty(size, size, device=context.device, dtype=dtype)
        seconds = median_seconds([lambda a=a, b=b, out=out: torch.mm(a, b, out=out) for a, b in sets], context)
        yield {
            "what": f"matmul {str(dtype).removeprefix('torch.')}",
            "size": size,
            "flops_per_s": 2 * size**3 / seconds,
        }
    yield _fp8(context, size)
    source = torch.randn(context.pick(1 << 30, 1 << 20) // 4, device=context.device)
    target = torch.empty_like(source)
    seconds = median_seconds([lambda: target.copy_(source)], context)
    yield {"what": "copy", "size": source.nbytes, "bytes_per_s": 2 * source.nbytes / seconds}


def _fp8(context: Context, size: int) -> dict[str, Any]:
    """Per-tensor scales, e4m3 x e4m3 to bf16, as cuBLASLt runs it; also without Transformer Engine."""
    e4m3, one = torch.float8_e4m3fn, torch.ones((), device=context.device)
    sets = [
        (
            torch.randn(size, size, device=context.device).to(e4m3),
            torch.randn(size, size, device=context.device).to(e4m3).t(),
        )
        for _ in range(context.pick(4, 2))
    ]
    work = [
        lambda a=a, b=b: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16) for a, b in sets
    ]
    return {"what": "matmul float8_e4m3", "size": size, "flops_per_s": 2 * size**3 / median_seconds(work, context)}


def median_seconds(work: list[Callable[[], Any]], context: Context) -> float:
    """Median over rounds of the calls, each round through all of ``work``, after a warm-up."""
    rounds = context.pick(10, 2)
    for call in work:
        call()
    seconds = []
    for _ in range(rounds):
        if context.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for call in work:
                call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000 / len(work))
        else:
            started = time.perf_counter()
            for call in work:
                call()
            seconds.append((time.perf_counter() - started) / len(work))
    return statistics.median(seconds)
