"""The Triton kernels on a GPU, against float64 and against the plain form, at real vocabularies."""

from __future__ import annotations

import pytest
import torch

from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN = 700, 256


def run(vocab_size: int, padded: int, dtype: torch.dtype, *, fused: bool) -> list[torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=draw, device="cuda").to(dtype).requires_grad_()
    weight_VH = (0.2 * torch.randn(padded, HIDDEN, generator=draw, device="cuda")).to(dtype).requires_grad_()
    targets_T = torch.randint(0, vocab_size, (TOKENS,), generator=draw, device="cuda")
    grad_T = torch.randn(TOKENS, generator=draw, device="cuda")
    if dtype == torch.float64:
        logps_T = (hidden_TH @ weight_VH[:vocab_size].t()).log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    else:
        logps_T = selected_logprobs(hidden_TH, weight_VH, targets_T, vocab_size=vocab_size, chunk_size=256, fused=fused)
    logps_T.backward(grad_T.to(logps_T.dtype))
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    return [t.detach().double() for t in (logps_T, hidden_TH.grad, weight_VH.grad)]


@pytest.mark.parametrize(("vocab_size", "padded"), [(1000, 1024), (50257, 50304), (128256, 128256)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernels_agree_with_the_plain_form_and_with_float64(
    vocab_size: int, padded: int, dtype: torch.dtype, tolerance: float
):
    plain, fused = (run(vocab_size, padded, dtype, fused=choice) for choice in (False, True))
    exact = run(vocab_size, padded, torch.float64, fused=False)
    for ours, theirs, wanted in zip(fused, plain, exact):
        scale = wanted.norm()
        assert (ours - theirs).norm() <= tolerance * scale
        if dtype == torch.float32:
            assert (ours - wanted).norm() <= 1e-4 * scale
