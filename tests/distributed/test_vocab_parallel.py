"""Selected log-probabilities over a vocabulary that is split between ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rank_pool import RankPool

VOCAB, PADDED, HIDDEN, TOKENS = 29, 40, 6, 11  # the last of four ranks has padding alone


def inputs(scale: float) -> tuple[torch.Tensor, ...]:
    """hidden [T, H], weight [V, H], targets [T], incoming gradient [T], float64."""
    draw = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    weight_VH = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64) * scale
    targets_T = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    return hidden_TH, weight_VH, targets_T, torch.randn(TOKENS, generator=draw, dtype=torch.float64)


def on_rank(scale: float, chunk_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, this rank's part of the hidden gradient, the gradient of this rank's rows."""
    import torch.distributed as dist

    from megatron_groupdpo.mcore.logprobs import selected_logprobs

    dist.init_process_group("gloo")
    hidden_TH, weight_VH, targets_T, grad_T = inputs(scale)
    hidden_TH = hidden_TH.float().requires_grad_()
    own_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()].float().clone().requires_grad_()
    logps_T = selected_logprobs(
        hidden_TH, own_VH, targets_T, vocab_size=VOCAB, chunk_size=chunk_size, tp_group=dist.group.WORLD
    )
    logps_T.backward(grad_T.float())
    dist.destroy_process_group()
    assert hidden_TH.grad is not None
    assert own_VH.grad is not None
    return logps_T.detach().numpy(), hidden_TH.grad.numpy(), own_VH.grad.numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_split_vocabulary_gives_the_values_and_gradients_of_the_whole_one(
    pool: RankPool, num_ranks: int, scale: float
):
    hidden_TH, weight_VH, targets_T, grad_T = inputs(scale)
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    table_TV = (hidden_TH @ weight_VH[:VOCAB].T).log_softmax(-1)
    logps_T = table_TV[torch.arange(TOKENS), targets_T]
    logps_T.backward(grad_T)
    parts = pool.run(num_ranks, on_rank, scale, 4)
    atol = 1e-4 * scale
    for values, _, _ in parts:
        np.testing.assert_allclose(values, logps_T.detach().numpy(), rtol=1e-4, atol=atol)
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    np.testing.assert_allclose(sum(hidden for _, hidden, _ in parts), hidden_TH.grad.numpy(), rtol=1e-4, atol=atol)
    np.testing.assert_allclose(
        np.concatenate([rows for _, _, rows in parts]), weight_VH.grad.numpy(), rtol=1e-4, atol=atol
    )
