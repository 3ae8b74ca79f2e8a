"""What context-parallel ranks exchange: keys and values in attention, and the parts of a response's log-probability."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def gather_keys(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S / size, ...] of every rank to [S, ...], rank after rank; the backward sums the ranks' gradients."""
    return gather_from_sequence_parallel_region(shard, tensor_parallel_output_grad=True, group=group)


def sum_over_ranks(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' parts, equal on all; each part gets the whole gradient."""
    return _Sum.apply(partial, group)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
