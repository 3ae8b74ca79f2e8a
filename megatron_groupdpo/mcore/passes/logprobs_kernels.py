"""Triton kernels over a chunk of logits [C, V]: read once in the forward, read and written once in the backward.

The plain form makes a float32 copy of the logits and then goes over it five times. These keep the matrix product's
dtype in memory and compute in float32. Imported only where they are used: Triton is not on every machine. With
``TRITON_INTERPRET=1`` in the environment before the import, they run on a CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 4096
_LOWEST = tl.constexpr(-3.0e38)  # not -inf: the difference of two would be NaN where a rank has no real token


@triton.jit
def statistics_kernel(logits, columns, peaks, sums, picked, stride, NUM_REAL: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: largest logit, sum of exp above it, and the logit at the row's column (0 where it has none)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    peak = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, NUM_REAL, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < NUM_REAL, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    column = tl.load(columns + row)
    chosen = tl.load(logits + column, mask=(column >= 0) & (column < NUM_REAL), other=0.0).to(tl.float32)
    tl.store(peaks + row, peak)
    tl.store(sums + row, total)
    tl.store(picked + row, chosen)


@triton.jit
def gradient_kernel(logits, columns, peaks, log_sums, grads, stride, num_columns, num_real, BLOCK: tl.constexpr):
    """A block of a row a program: logits become (onehot - probability) * grad, 0 in columns that only pad."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    x = tl.load(logits + at, mask=at < num_real, other=float("-inf")).to(tl.float32)
    probability = tl.exp((x - tl.load(peaks + row)) - tl.load(log_sums + row))
    hit = tl.where(at == tl.load(columns + row), 1.0, 0.0)
    gradient = (hit - probability) * tl.load(grads + row)
    tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < num_columns)


def statistics(logits_CV: Tensor, columns_C: Tensor, num_real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Peaks, sums of exp above them, and logits of the columns, each [C] float32; columns from ``num_real`` on pad.

    ``columns_C`` [C] int64 is negative where the target is another rank's; its logit is then 0.
    """
    peaks_C, sums_C, picked_C = (
        torch.empty(len(columns_C), dtype=torch.float32, device=logits_CV.device) for _ in range(3)
    )
    statistics_kernel[(len(columns_C),)](
        logits_CV,
        columns_C,
        peaks_C,
        sums_C,
        picked_C,
        logits_CV.stride(0),
        num_real,  # pyright: ignore[reportArgumentType]
        BLOCK=BLOCK_COLUMNS,  # pyright: ignore[reportArgumentType]
    )
    return peaks_C, sums_C, picked_C


def gradient_(
    logits_CV: Tensor, columns_C: Tensor, peaks_C: Tensor, log_sums_C: Tensor, grad_C: Tensor, num_real: int
) -> Tensor:
    """Write the gradient by the logits over them."""
    num_rows, num_columns = logits_CV.shape
    grid = (num_rows, triton.cdiv(num_columns, BLOCK_COLUMNS))
    gradient_kernel[grid](
        logits_CV,
        columns_C,
        peaks_C,
        log_sums_C,
        grad_C,
        logits_CV.stride(0),
        num_columns,
        num_real,
        BLOCK=BLOCK_COLUMNS,  # pyright: ignore[reportArgumentType]
    )
    return logits_CV
