"""Log-probabilities of chosen tokens: vocab-parallel, at the asked positions only, in chunks.

Neither pass ever holds more than ``chunk_size`` rows of logits. The forward keeps the hidden states (which the
graph holds anyway) and one log-normaliser per token; the backward makes each chunk's logits again.

For hidden state h, output weight W and target y, with z = W h and Z = logsumexp(z):
    log p(y) = z_y - Z            d log p(y) / dz = onehot(y) - softmax(z)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    ) -> Tensor:
        num_tokens = hidden_TH.shape[0]
        logps_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TH.device)
        log_norms_T = torch.empty_like(logps_T)
        for start in range(0, num_tokens, chunk_size):
            part = slice(start, start + chunk_size)
            logits_CV = _logits(hidden_TH[part], weight_VH, vocab_start, vocab_size)
            log_norms_T[part] = _log_normaliser(logits_CV, tp_group)
            logps_T[part] = _target_logits(logits_CV, targets_T[part], vocab_start, tp_group) - log_norms_T[part]
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, log_norms_T)
        ctx.vocab_start, ctx.vocab_size, ctx.chunk_size = vocab_start, vocab_size, chunk_size
        return logps_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_T,) = grad_outputs
        hidden_TH, weight_VH, targets_T, log_norms_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        # Summed over chunks in float32: many small terms in bf16 would lose the tail.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden_TH.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            logits_CV = _logits(hidden_TH[part], weight_VH, ctx.vocab_start, ctx.vocab_size)
            grad_logits_CV = torch.exp_(logits_CV.sub_(log_norms_T[part, None])).neg_()
            column_C, mine_C = _local_columns(targets_T[part], ctx.vocab_start, weight_VH.shape[0])
            grad_logits_CV[torch.arange(column_C.numel(), device=column_C.device), column_C] += mine_C
            grad_logits_CV = grad_logits_CV.mul_(grad_T[part, None]).to(weight_VH.dtype)
            if grad_hidden_TH is not None:
                grad_hidden_TH[part] = grad_logits_CV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += grad_logits_CV.t() @ hidden_TH[part]
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _logits(hidden_CH: Tensor, weight_VH: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    logits_CV = torch.matmul(hidden_CH, weight_VH.t()).float()
    # Rows beyond the tokenizer's vocabulary only pad the matrix for tensor parallelism; they are no tokens, and a
    # model converted from elsewhere has no logits for them.
    num_real = max(0, min(weight_VH.shape[0], vocab_size - vocab_start))
    if num_real < weight_VH.shape[0]:
        logits_CV[:, num_real:] = float("-inf")
    return logits_CV


def _log_normaliser(logits_CV: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    if tp_group is None or tp_group.size() == 1:
        return torch.logsumexp(logits_CV, dim=-1)
    peak_C = logits_CV.amax(dim=-1)
    dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=tp_group)
    sum_C = torch.exp(logits_CV - peak_C[:, None]).sum(dim=-1)
    dist.all_reduce(sum_C, group=tp_group)
    return peak_C + torch.log(sum_C)


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
) -> Tensor:
    """Log-probability of ``targets_T`` given the hidden states before the output layer.

    Args:
        hidden_TH: [T, H] hidden states, equal on every tensor-parallel rank.
        weight_VH: [V, H] this rank's rows of the output weight.
        targets_T: [T] int64 token ids in ``[0, vocab_size)``.
        vocab_size: number of real tokens; weight rows beyond it are padding and get probability 0.
        chunk_size: rows of logits held at a time.
        tp_group: ranks that share the vocabulary; ``None`` for one rank.

    Returns:
        [T] float32. The gradient that flows to ``hidden_TH`` is this rank's part; the caller's region function
        (all-reduce, or reduce-scatter under sequence parallelism) sums it over ``tp_group``.
    """
    rank = 0 if tp_group is None else tp_group.rank()
    vocab_start = rank * weight_VH.shape[0]
    return _SelectedLogProbs.apply(  # type: ignore[no-any-return]
        hidden_TH, weight_VH, targets_T, vocab_start, vocab_size, chunk_size, tp_group
    )
