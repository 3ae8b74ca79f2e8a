"""Selected log-probabilities equal a float64 log_softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_groupdpo.mcore.passes import logprobs
from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs

VOCAB, PADDED, HIDDEN = 37, 40, 8


def inputs(num_tokens: int, *, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], targets [T], incoming gradient [T], float64."""
    draw = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=draw, dtype=torch.float64) * scale
    weight_VH = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64)
    targets_T = torch.randint(0, VOCAB, (num_tokens,), generator=draw)
    return hidden_TH, weight_VH, targets_T, torch.randn(num_tokens, generator=draw, dtype=torch.float64)


def oracle(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, grad_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and the two gradients, over the real vocabulary alone."""
    hidden_TH, weight_VH = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    table_TV = (hidden_TH @ weight_VH[:VOCAB].T).log_softmax(-1)
    logps_T = table_TV[torch.arange(len(targets_T)), targets_T]
    logps_T.backward(grad_T)
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    return logps_T.detach(), hidden_TH.grad, weight_VH.grad


def ours(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, grad_T: Tensor, *, chunk_size: int = 4, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_TH = hidden_TH.to(dtype).requires_grad_()
    weight_VH = weight_VH.to(dtype).requires_grad_()
    logps_T = selected_logprobs(hidden_TH, weight_VH, targets_T, vocab_size=VOCAB, chunk_size=chunk_size)
    assert logps_T.dtype == torch.float32
    logps_T.backward(grad_T.float())
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    return logps_T.detach(), hidden_TH.grad, weight_VH.grad


@settings(max_examples=40, deadline=None)
@given(num_tokens=st.integers(1, 13), chunk_size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_values_and_gradients_equal_log_softmax_for_any_chunk_size(num_tokens: int, chunk_size: int, seed: int):
    given = inputs(num_tokens, seed=seed)
    for found, wanted in zip(ours(*given, chunk_size=chunk_size), oracle(*given)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_pad_the_vocabulary_have_probability_zero_and_no_gradient():
    hidden_TH, weight_VH, targets_T, grad_T = inputs(9)
    weight_VH[VOCAB:] = hidden_TH[0] * 100  # would win every softmax
    given = (hidden_TH, weight_VH, targets_T, grad_T)
    logps_T, _, grad_weight_VH = ours(*given)
    torch.testing.assert_close(logps_T.double(), oracle(*given)[0], rtol=1e-5, atol=1e-5)
    assert (grad_weight_VH[VOCAB:] == 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite_and_exact(size: float):
    """One logit of +-1e4 among small ones: the log-probability is the difference, not an overflow."""
    hidden_TH = torch.zeros(2, HIDDEN, dtype=torch.float64)
    hidden_TH[:, 0] = 1.0
    weight_VH = torch.zeros(PADDED, HIDDEN, dtype=torch.float64)
    weight_VH[5, 0] = size
    given = (hidden_TH, weight_VH, torch.tensor([5, 6]), torch.ones(2, dtype=torch.float64))
    for found, wanted in zip(ours(*given), oracle(*given)):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


TABLES = {
    "all tied at 1e4": [1e4] * VOCAB,
    "all tied at -1e4": [-1e4] * VOCAB,
    "two tied at 1e4, the rest at -1e4": [1e4, 1e4, *[-1e4] * (VOCAB - 2)],
    "near ties at 1e4": [1e4 - step / 4 for step in range(VOCAB)],
    "from -1e4 to 1e4": [-1e4 + step * 500.0 for step in range(VOCAB)],
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("padding", [0, 3], ids=["whole vocabulary", "padded"])
@pytest.mark.parametrize("chunk_size", [5, 100])
def test_extreme_and_tied_logits_lose_nothing_to_float32(table: str, padding: int, chunk_size: int):
    """Logits that float32 holds exactly, every token as target: only log_softmax's own rounding may remain."""
    hidden_TH = torch.tensor([TABLES[table]] * VOCAB)
    weight_VH = torch.cat([torch.eye(VOCAB), torch.full((padding, VOCAB), 7.0)])
    given = (hidden_TH, weight_VH, torch.arange(VOCAB), torch.linspace(-1, 2, VOCAB))
    wanted = oracle(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
    for found, exact in zip(ours(*given, chunk_size=chunk_size), wanted):
        # The weight's gradient is 1e4 times the logits'.
        scale = max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(found.double() / scale, exact / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_around_a_chunks_boundary_are_all_there(num_tokens: int, dtype: torch.dtype):
    given = inputs(num_tokens, seed=num_tokens)
    rounded = (given[0].to(dtype).double(), given[1].to(dtype).double(), *given[2:])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for found, wanted in zip(ours(*given, chunk_size=8, dtype=dtype), oracle(*rounded)):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_bf16_weight_gradient_keeps_the_tail_of_many_chunks(monkeypatch: pytest.MonkeyPatch):
    """2,048 equal terms: a bf16 sum would stand still after 256 of them. In slices of the vocabulary, a ragged last."""
    monkeypatch.setattr(logprobs, "_WEIGHT_ROWS", 7)
    hidden_TH = torch.ones(2048, HIDDEN, dtype=torch.float64)
    weight_VH = torch.zeros(PADDED, HIDDEN, dtype=torch.float64)
    given = (hidden_TH, weight_VH, torch.zeros(2048, dtype=torch.int64), torch.ones(2048, dtype=torch.float64))
    found, wanted = ours(*given, chunk_size=1, dtype=torch.bfloat16)[2], oracle(*given)[2]
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_a_gradient_that_is_not_asked_for_is_not_made(needed: str):
    hidden_TH, weight_VH, targets_T, grad_T = inputs(9)
    leaves = {"hidden": hidden_TH.float(), "weight": weight_VH.float()}
    leaves[needed].requires_grad_()
    selected_logprobs(leaves["hidden"], leaves["weight"], targets_T, vocab_size=VOCAB, chunk_size=4).backward(
        grad_T.float()
    )
    wanted = dict(zip(leaves, oracle(hidden_TH, weight_VH, targets_T, grad_T)[1:]))[needed]
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]
    torch.testing.assert_close(leaves[needed].grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_chunk_of_logits_and_the_gradients_whatever_the_tokens(num_tokens: int, dtype: torch.dtype):
    """Exact bytes of the allocator: the logits of all tokens exist in neither pass."""
    vocab_size, chunk_size, num_tokens = 4096, 16, num_tokens * 100
    hidden_TH = torch.randn(num_tokens, HIDDEN, dtype=dtype, requires_grad=True)
    weight_VH = torch.randn(vocab_size, HIDDEN, dtype=dtype, requires_grad=True)
    targets_T = torch.zeros(num_tokens, dtype=torch.int64)

    def forward() -> Tensor:
        return selected_logprobs(hidden_TH, weight_VH, targets_T, vocab_size=vocab_size, chunk_size=chunk_size)

    # bf16: the product stands beside its float32 copy, and CPU matrix kernels convert their arguments, some by thread.
    chunk = chunk_size * vocab_size * (4 if dtype == torch.float32 else 24)
    small = 64 * num_tokens + 4096  # a few vectors over tokens
    assert allocations(torch.no_grad()(forward)).peak <= chunk + small
    gradients = hidden_TH.numel() * dtype.itemsize + weight_VH.numel() * 6
    found = allocations(lambda: forward().sum().backward())
    assert found.peak <= chunk + gradients + small
    if num_tokens and dtype == torch.float32:
        assert found.largest == chunk_size * vocab_size * 4


def test_no_tokens_give_no_values_and_zero_gradients():
    logps_T, grad_hidden_TH, grad_weight_VH = ours(*inputs(0))
    assert logps_T.shape == (0,)
    assert grad_hidden_TH.shape == (0, HIDDEN)
    assert (grad_weight_VH == 0).all()


def test_bf16_inputs_give_the_float32_values_of_the_rounded_product():
    hidden_TH, weight_VH, targets_T, grad_T = inputs(6)
    rounded = (hidden_TH.bfloat16().double(), weight_VH.bfloat16().double(), targets_T, grad_T)
    for found, wanted in zip(ours(hidden_TH, weight_VH, targets_T, grad_T, dtype=torch.bfloat16), oracle(*rounded)):
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05)


def test_inputs_are_left_as_they_were():
    hidden_TH, weight_VH, targets_T, grad_T = (tensor.clone() for tensor in inputs(7))
    ours(hidden_TH, weight_VH, targets_T, grad_T, dtype=torch.float64)
    for found, wanted in zip((hidden_TH, weight_VH, targets_T, grad_T), inputs(7)):
        assert torch.equal(found.detach(), wanted)
