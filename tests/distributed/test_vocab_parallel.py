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

    from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs

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


def table_on_rank(logits_V: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every token as a target, and its gradient with respect to the logits, in chunks of 4."""
    import torch.distributed as dist

    from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs

    dist.init_process_group("gloo")
    # One-hot rows: logits are the given numbers, and the hidden gradient is theirs.
    whole_VH = torch.cat([torch.eye(VOCAB), torch.full((PADDED - VOCAB, VOCAB), 7.0)])
    own_VH = whole_VH.chunk(dist.get_world_size())[dist.get_rank()]
    hidden_TH = torch.tensor([logits_V] * VOCAB, requires_grad=True)
    logps_T = selected_logprobs(
        hidden_TH, own_VH, torch.arange(VOCAB), vocab_size=VOCAB, chunk_size=4, tp_group=dist.group.WORLD
    )
    logps_T.sum().backward()
    dist.destroy_process_group()
    assert hidden_TH.grad is not None
    return logps_T.detach().numpy(), hidden_TH.grad.numpy()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    "logits_V",
    [[1e4] * VOCAB, [-1e4] * VOCAB, [1e4, *[-1e4] * (VOCAB - 2), 1e4], [1e4 - step / 4 for step in range(VOCAB)]],
    ids=["all tied at 1e4", "all tied at -1e4", "first and last tied at 1e4", "near ties at 1e4"],
)
def test_extreme_and_tied_logits_of_several_ranks_lose_nothing_to_float32(
    pool: RankPool, num_ranks: int, logits_V: list[float]
):
    exact_TV = torch.tensor([logits_V] * VOCAB, dtype=torch.float64, requires_grad=True)
    logps_T = exact_TV.log_softmax(-1).diagonal()
    logps_T.sum().backward()
    assert exact_TV.grad is not None
    parts = pool.run(num_ranks, table_on_rank, logits_V)
    for values, _ in parts:
        np.testing.assert_allclose(values, logps_T.detach().numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sum(grad for _, grad in parts), exact_TV.grad.numpy(), rtol=1e-5, atol=2e-6)
