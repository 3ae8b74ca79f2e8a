"""The Triton kernels, through Triton's interpreter, give the plain form's values and gradients."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from layout_case import LayoutCase
from parity import SP, TP2
from rank_pool import RankPool
from test_gradient import check_gradient
from test_vocab_parallel import PADDED, TOKENS, VOCAB, inputs

pytest.importorskip("triton", reason="the kernels are Triton's")

BLOCK = 8  # columns of a program: several, and the last one cut by the vocabulary's end


def interpreted() -> None:
    """Before the kernels are imported in this process."""
    os.environ["TRITON_INTERPRET"] = "1"
    from megatron_groupdpo.mcore import logprobs_kernels

    logprobs_kernels.BLOCK_COLUMNS = BLOCK


def both_forms(scale: float, chunk_size: int, dtype: str) -> list[list[np.ndarray]]:
    """Values, hidden gradient and gradient of this rank's rows: plain, then fused."""
    import torch.distributed as dist

    from megatron_groupdpo.mcore.logprobs import selected_logprobs

    interpreted()
    dist.init_process_group("gloo")
    forms = []
    for fused in (False, True):
        hidden_TH, weight_VH, targets_T, grad_T = inputs(scale)
        hidden_TH = hidden_TH.to(getattr(torch, dtype)).requires_grad_()
        own_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()].to(hidden_TH.dtype).clone().requires_grad_()
        given = {"vocab_size": VOCAB, "chunk_size": chunk_size, "tp_group": dist.group.WORLD}
        logps_T = selected_logprobs(hidden_TH, own_VH, targets_T, fused=fused, **given)
        logps_T.backward(grad_T.float())
        assert hidden_TH.grad is not None
        assert own_VH.grad is not None
        forms.append([t.detach().float().numpy() for t in (logps_T, hidden_TH.grad, own_VH.grad)])
    dist.destroy_process_group()
    return forms


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("scale", "dtype"), [(1.0, "float32"), (1e3, "float32"), (1.0, "bfloat16")])
def test_kernels_and_plain_form_agree_in_values_and_gradients(pool: RankPool, num_ranks: int, scale: float, dtype: str):
    """On four ranks the last one's columns only pad; 11 tokens in chunks of 4."""
    assert PADDED // 4 * 3 >= VOCAB
    assert TOKENS % 4
    # In bf16 both round the same logits, and gradients once: a unit in the last place, where float32 sums differ.
    rtol, atol = (1e-5, 2e-6 * scale) if dtype == "float32" else (2e-2, 1e-2)
    for plain, fused in pool.run(num_ranks, both_forms, scale, 4, dtype):
        for wanted, found in zip(plain, fused):
            assert np.abs(wanted).max() > 0.1 or num_ranks == 4  # the rank of padding has no gradient
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def run_fused_case(case: LayoutCase) -> Any:
    from layout_run import run_case

    interpreted()
    return run_case(case)


def test_the_gradient_of_a_tensor_parallel_run_through_the_kernels_is_that_of_the_one_graph(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
):
    import test_gradient

    monkeypatch.setattr(test_gradient, "run_case", run_fused_case)
    case = LayoutCase(num_ranks=2, parallel={**TP2, **SP}, precision={"fused_logprobs": "on"}, num_groups=2)
    check_gradient(pool, case)


def what_on_says_on_a_cpu() -> str:
    from megatron_groupdpo.errors import ConfigError
    from megatron_groupdpo.mcore.logprobs import choose_fused

    os.environ.pop("TRITON_INTERPRET", None)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not choose_fused("auto", cpu)
    assert choose_fused("auto", gpu)
    assert not choose_fused("off", gpu)
    with pytest.raises(ConfigError) as refusal:
        choose_fused("on", cpu)
    return str(refusal.value)


def test_kernels_are_chosen_on_a_gpu_and_refused_on_a_cpu(pool: RankPool):
    (message,) = pool.run(1, what_on_says_on_a_cpu)
    assert message == "fused_logprobs 'on' needs a GPU and the run's device is the CPU; use auto or off."
