"""Selected log-probabilities equal a float64 log_softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_groupdpo.mcore.logprobs import selected_logprobs

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
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)


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
