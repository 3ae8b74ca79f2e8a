"""Log-probabilities of chosen tokens: vocab-parallel, at the asked positions only, in chunks.

Neither pass ever holds more than ``chunk_size`` rows of logits, and those once: what follows from them is written over
them. The forward keeps the hidden states (which the graph holds anyway) and two floats per token; the backward makes
each chunk's logits again.

For hidden state h, output weight W and target y, with z = W h, m = max z and l = log sum exp(z - m):
    log p(y) = (z_y - m) - l            d log p(y) / dz = onehot(y) - exp((z - m) - l)
m and l are kept apart: at |z| = 1e4, a float32 m + l has lost l's fourth digit.

What is done with a chunk's logits has two forms: PyTorch's operators, and on a GPU the kernels of
``logprobs_kernels.py``. The matrix products are PyTorch's in both.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_groupdpo.errors import ConfigError

_WEIGHT_ROWS = 16384
"""Rows of the weight's gradient made at a time where they are summed in another dtype than they are made in."""


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        vocab_start: int,
        vocab_size: int,
        chunk_size: int,
        tp_group: dist.ProcessGroup | None,
        fused: bool,
    ) -> Tensor:
        chunk_logprobs = _fused_chunk_logprobs if fused else _chunk_logprobs
        num_tokens = hidden_TH.shape[0]
        logps_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TH.device)
        peaks_T, log_sums_T = torch.empty_like(logps_T), torch.empty_like(logps_T)
        for start in range(0, num_tokens, chunk_size):
            part = slice(start, start + chunk_size)
            # A function of its own, so that a chunk's logits are gone before the next ones are made.
            logps_T[part], peaks_T[part], log_sums_T[part] = chunk_logprobs(
                hidden_TH[part], weight_VH, targets_T[part], vocab_start, vocab_size, tp_group
            )
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, peaks_T, log_sums_T)
        ctx.vocab_start, ctx.vocab_size, ctx.chunk_size, ctx.fused = vocab_start, vocab_size, chunk_size, fused
        return logps_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_T,) = grad_outputs
        hidden_TH, weight_VH, targets_T, peaks_T, log_sums_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        weight_sum = _WeightGradient(weight_VH, num_chunks=-(-hidden_TH.shape[0] // ctx.chunk_size))
        for start in range(0, hidden_TH.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            given = (hidden_TH[part], weight_VH, targets_T[part], peaks_T[part], log_sums_T[part], grad_T[part])
            make = _fused_chunk_gradient if ctx.fused else _chunk_gradient
            grad_logits_CV = make(*given, ctx.vocab_start, ctx.vocab_size)
            if grad_hidden_TH is not None:
                torch.mm(grad_logits_CV, weight_VH, out=grad_hidden_TH[part])
            if needs_weight:
                weight_sum.add(grad_logits_CV, hidden_TH[part])
            del grad_logits_CV  # before the next chunk's logits are made
        grad_weight_VH = weight_sum.total() if needs_weight else None
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None, None


class _WeightGradient:
    """Sum over chunks of grad_logits^T hidden, in float32 at least: many small terms in bf16 would lose the tail."""

    def __init__(self, weight_VH: Tensor, *, num_chunks: int) -> None:
        self.weight_VH = weight_VH
        self.num_chunks = num_chunks
        self.sum_VH: Tensor | None = None

    def add(self, grad_logits_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.num_chunks == 1:
            self.sum_VH = grad_logits_CV.t() @ hidden_CH  # nothing to add it to, hence no float32 copy
            return
        if self.sum_VH is None:
            self.sum_VH = torch.zeros_like(self.weight_VH, dtype=torch.promote_types(torch.float32, hidden_CH.dtype))
        if self.sum_VH.dtype == hidden_CH.dtype:
            self.sum_VH.addmm_(grad_logits_CV.t(), hidden_CH)
            return
        for start in range(0, self.sum_VH.shape[0], _WEIGHT_ROWS):
            rows = slice(start, start + _WEIGHT_ROWS)
            self.sum_VH[rows] += grad_logits_CV[:, rows].t() @ hidden_CH

    def total(self) -> Tensor:
        """[V, H] in the weight's dtype."""
        return torch.zeros_like(self.weight_VH) if self.sum_VH is None else self.sum_VH.to(self.weight_VH.dtype)


def _chunk_logprobs(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    vocab_start: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, largest logits and log-sums above those, each [C] float32."""
    shared = tp_group is not None and tp_group.size() > 1
    logits_CV = _logits(hidden_CH, weight_VH, vocab_start, vocab_size)
    peak_C = logits_CV.amax(dim=-1)
    if shared:
        dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=tp_group)
    picked_C = _target_logits(logits_CV, targets_C, vocab_start, tp_group)
    sum_C = logits_CV.sub_(peak_C[:, None]).exp_().sum(dim=-1)
    if shared:
        dist.all_reduce(sum_C, group=tp_group)
    log_sum_C = sum_C.log_()
    return (picked_C - peak_C) - log_sum_C, peak_C, log_sum_C


def _chunk_gradient(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    peak_C: Tensor,
    log_sum_C: Tensor,
    grad_C: Tensor,
    vocab_start: int,
    vocab_size: int,
) -> Tensor:
    """[C, V] gradient by the logits, in the weight's dtype."""
    grad_logits_CV = _logits(hidden_CH, weight_VH, vocab_start, vocab_size)
    grad_logits_CV.sub_(peak_C[:, None]).sub_(log_sum_C[:, None]).exp_().neg_()
    column_C, mine_C = _local_columns(targets_C, vocab_start, weight_VH.shape[0])
    grad_logits_CV[torch.arange(column_C.numel(), device=column_C.device), column_C] += mine_C
    return grad_logits_CV.mul_(grad_C[:, None]).to(weight_VH.dtype)


def _fused_chunk_logprobs(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    vocab_start: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_chunk_logprobs`; each rank's sum is above its own peak, then brought to that of all."""
    from megatron_groupdpo.mcore.passes import logprobs_kernels

    logits_CV = torch.matmul(hidden_CH, weight_VH.t())
    num_real = _num_real(weight_VH, vocab_start, vocab_size)
    peak_C, sum_C, picked_C = logprobs_kernels.statistics(logits_CV, targets_C - vocab_start, num_real)
    if tp_group is not None and tp_group.size() > 1:
        own_peak_C = peak_C.clone()
        dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=tp_group)
        parts_2C = torch.stack([sum_C * (own_peak_C - peak_C).exp_(), picked_C])
        dist.all_reduce(parts_2C, group=tp_group)
        sum_C, picked_C = parts_2C
    log_sum_C = sum_C.log()
    return (picked_C - peak_C) - log_sum_C, peak_C, log_sum_C


def _fused_chunk_gradient(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    peak_C: Tensor,
    log_sum_C: Tensor,
    grad_C: Tensor,
    vocab_start: int,
    vocab_size: int,
) -> Tensor:
    """As :func:`_chunk_gradient`, over the logits themselves."""
    from megatron_groupdpo.mcore.passes import logprobs_kernels

    logits_CV = torch.matmul(hidden_CH, weight_VH.t())
    num_real = _num_real(weight_VH, vocab_start, vocab_size)
    return logprobs_kernels.gradient_(
        logits_CV, targets_C - vocab_start, peak_C, log_sum_C, grad_C.contiguous(), num_real
    )


def _num_real(weight_VH: Tensor, vocab_start: int, vocab_size: int) -> int:
    """Columns of this rank that are tokens.

    Rows beyond the tokenizer's vocabulary only pad the matrix for tensor parallelism; they are no tokens, and a model
    converted from elsewhere has no logits for them.
    """
    return max(0, min(weight_VH.shape[0], vocab_size - vocab_start))


def _logits(hidden_CH: Tensor, weight_VH: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    logits_CV = torch.matmul(hidden_CH, weight_VH.t()).float()
    num_real = _num_real(weight_VH, vocab_start, vocab_size)
    if num_real < weight_VH.shape[0]:
        logits_CV[:, num_real:] = float("-inf")
    return logits_CV


def _target_logits(
    logits_CV: Tensor, targets_C: Tensor, vocab_start: int, tp_group: dist.ProcessGroup | None
) -> Tensor:
    column_C, mine_C = _local_columns(targets_C, vocab_start, logits_CV.shape[1])
    # where, not a product: a rank that lacks the token may read -inf in a padded column, and 0 * inf is NaN.
    picked_C = logits_CV.gather(1, column_C[:, None]).squeeze(1)
    picked_C = torch.where(mine_C, picked_C, torch.zeros_like(picked_C))
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(picked_C, group=tp_group)
    return picked_C


def _local_columns(targets_C: Tensor, vocab_start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's shard (0 where another rank has it), and whether it is here."""
    column_C = targets_C - vocab_start
    mine_C = (column_C >= 0) & (column_C < num_columns)
    return column_C.where(mine_C, torch.zeros_like(column_C)), mine_C


def selected_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    chunk_size: int,
    tp_group: dist.ProcessGroup | None = None,
    fused: bool = False,
) -> Tensor:
    """Log-probability of ``targets_T`` given the hidden states before the output layer.

    Args:
        hidden_TH: [T, H] hidden states, equal on every tensor-parallel rank.
        weight_VH: [V, H] this rank's rows of the output weight.
        targets_T: [T] int64 token ids in ``[0, vocab_size)``.
        vocab_size: number of real tokens; weight rows beyond it are padding and get probability 0.
        chunk_size: rows of logits held at a time.
        tp_group: ranks that share the vocabulary; ``None`` for one rank.
        fused: use the Triton kernels; see :func:`choose_fused`.

    Returns:
        [T] float32. The gradient that flows to ``hidden_TH`` is this rank's part; the caller's region function
        (all-reduce, or reduce-scatter under sequence parallelism) sums it over ``tp_group``.
    """
    rank = 0 if tp_group is None else tp_group.rank()
    vocab_start = rank * weight_VH.shape[0]
    return _SelectedLogProbs.apply(  # type: ignore[no-any-return]
        hidden_TH, weight_VH, targets_T, vocab_start, vocab_size, chunk_size, tp_group, fused
    )


def choose_fused(asked: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether log-probabilities go through the Triton kernels; ``auto``: on a GPU where Triton can be imported.

    Raises:
        ConfigError: ``on`` where they cannot run.
    """
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return False
    # The interpreter is slow, and exact: it lets the kernels be tested without a GPU.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("fused_logprobs 'on' needs a GPU and the run's device is the CPU; use auto or off.")
    try:
        import triton  # noqa: F401
    except Exception as error:  # a Triton that does not fit the driver raises more than ImportError
        if asked == "auto":
            return False
        raise ConfigError(
            f"fused_logprobs 'on' needs Triton, and importing it fails ({error}); install it, or use auto or off."
        ) from error
    return True
