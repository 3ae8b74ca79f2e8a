"""Runs on the ranks of ``test_fused_logprobs.py``; without Megatron, whose import costs more than the case."""

from __future__ import annotations

import numpy as np
import torch

TOKENS, PADDED, HIDDEN = 11, 40, 6
BLOCK = 8  # columns of a program: several, and the last one cut by the vocabulary's end


def small_blocks() -> None:
    from megatron_groupdpo.mcore.passes import logprobs_kernels

    logprobs_kernels.BLOCK_COLUMNS = BLOCK


def both_forms(vocab_size: int, scale: float, dtype: str) -> list[list[np.ndarray]]:
    """Values, hidden gradient and gradient of this rank's rows: plain, then fused; chunks of 4 tokens."""
    import torch.distributed as dist

    from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs

    dist.init_process_group("gloo")
    draw = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=draw).to(getattr(torch, dtype))
    weight_VH = (torch.randn(PADDED, HIDDEN, generator=draw) * scale).to(hidden_TH.dtype)
    own_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()]
    targets_T, grad_T = torch.randint(0, vocab_size, (TOKENS,), generator=draw), torch.randn(TOKENS, generator=draw)
    forms = []
    for fused in (False, True):
        hidden, own = hidden_TH.clone().requires_grad_(), own_VH.clone().requires_grad_()
        given = {"vocab_size": vocab_size, "chunk_size": 4, "tp_group": dist.group.WORLD}
        logps_T = selected_logprobs(hidden, own, targets_T, fused=fused, **given)
        logps_T.backward(grad_T)
        assert hidden.grad is not None
        assert own.grad is not None
        forms.append([t.detach().float().numpy() for t in (logps_T, hidden.grad, own.grad)])
    dist.destroy_process_group()
    return forms
