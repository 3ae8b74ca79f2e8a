"""The Triton kernels, through Triton's interpreter, give the plain form's values and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fused_case import PADDED, both_forms, small_blocks
from layout_case import LayoutCase
from parity import SP, TP2
from rank_pool import RankPool
from test_gradient import check_gradient

pytest.importorskip("triton", reason="the kernels are Triton's")


@pytest.fixture(scope="module")
def interpreting() -> Iterator[RankPool]:
    """Ranks in which Triton interprets: it decides that when it is first imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        ranks = RankPool(2)
        ranks.run(2, small_blocks)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(("num_ranks", "vocab_size"), [(1, 29), (2, 29), (2, 20)])
@pytest.mark.parametrize(("scale", "dtype"), [(1.0, "float32"), (1e3, "float32"), (1.0, "bfloat16")])
@pytest.mark.costly
def test_kernels_and_plain_form_agree_in_values_and_gradients(
    interpreting: RankPool, num_ranks: int, vocab_size: int, scale: float, dtype: str
):
    """With 20 words on two ranks, the second one's columns only pad."""
    # In bf16 both round the same logits, and gradients once: a unit in the last place, where float32 sums differ.
    rtol, atol = (1e-5, 2e-6 * scale) if dtype == "float32" else (2e-2, 1e-2)
    for rank, (plain, fused) in enumerate(interpreting.run(num_ranks, both_forms, vocab_size, scale, dtype)):
        for wanted, found in zip(plain, fused):
            only_pads = vocab_size == rank * PADDED // num_ranks
            assert np.abs(wanted).max() > 0.1 or only_pads
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.costly
def test_the_gradient_of_a_tensor_parallel_run_through_the_kernels_is_that_of_the_one_graph(interpreting: RankPool):
    case = LayoutCase(num_ranks=2, parallel={**TP2, **SP}, precision={"fused_logprobs": "on"}, num_groups=2)
    check_gradient(interpreting, case)


def what_on_says_on_a_cpu() -> str:
    from megatron_groupdpo.errors import ConfigError
    from megatron_groupdpo.mcore.passes.logprobs import choose_fused

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not choose_fused("auto", cpu)
    assert choose_fused("auto", gpu)
    assert not choose_fused("off", gpu)
    with pytest.raises(ConfigError) as refusal:
        choose_fused("on", cpu)
    return str(refusal.value)


@pytest.mark.acts(
    "PrecisionConfig.fused_logprobs",
    reason="which form a run takes; that both are one function is shown by the tests beside it",
)
def test_kernels_are_chosen_on_a_gpu_and_refused_on_a_cpu(pool: RankPool):
    (message,) = pool.run(1, what_on_says_on_a_cpu)
    assert message == "fused_logprobs 'on' needs a GPU and the run's device is the CPU; use auto or off."
