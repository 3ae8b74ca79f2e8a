"""One GPU: the two passes against one graph, layers of Transformer Engine against local ones, packed against padded."""

from __future__ import annotations

import warnings
from typing import Any

import gpu_policies as gpu
import pytest
import torch

from megatron_groupdpo.mcore.passes.gradient import PlainEngine
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.train_step import accumulate_gradient

pytestmark = pytest.mark.gpu

FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
PLANS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": 3},
    "one by one": {"micro_batch_size": 1},
    "packed": {"max_tokens_per_microbatch": 300},
}
FP32 = 1e-4
"""Of float32 against float32, where kernels sum in other orders; the CPU's tests hold it to 1e-5."""
BF16 = 0.05
"""Of bf16 against float32: the bound of the CPU's own test of it."""


def two_passes(ranks: Any, plan: dict[str, Any], **how: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy = gpu.make_policy(ranks, **how)
    planned = gpu.planned_batch(ranks, **plan)
    given = (planned.batch, gpu.reference_of(planned), gpu.LOSS)
    outcome = accumulate_gradient(policy.engine, planned.microbatches, *given)
    assert outcome is not None
    assert outcome.score_drift is not None
    assert outcome.score_drift <= (1e-2 if how.get("bf16") else 1e-5)
    return outcome.logps_R, gpu.gradient_of(policy)


def has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def wanted() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """float32, local layers, a response a microbatch, plain log-probabilities."""
    with gpu.one_gpu() as ranks:
        return two_passes(ranks, PLANS["one by one"], fused_logprobs="off")


def test_two_passes_give_the_one_graphs_gradient():
    with gpu.one_gpu() as ranks:
        _, found = two_passes(ranks, PLANS["padded"])
        policy = gpu.make_policy(ranks)
        planned = gpu.planned_batch(ranks, micro_batch_size=20)  # all four groups in one microbatch, hence whole
        given = (planned.batch, gpu.reference_of(planned), gpu.LOSS)
        accumulate_coupled_gradient(PlainEngine(policy.engine), planned.microbatches, *given)
        assert gpu.gap(found, gpu.gradient_of(policy)) <= FP32


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", [{}, FULL, {"fused_logprobs": "on"}], ids=["plain", "recomputed", "fused"])
def test_fp32_agrees_on_every_placement(wanted: Any, plan: str, how: dict[str, Any]):
    with gpu.one_gpu() as ranks:
        logps_R, found = two_passes(ranks, PLANS[plan], **({"fused_logprobs": "off"} | how))
    torch.testing.assert_close(logps_R, wanted[0], rtol=1e-4, atol=1e-3)
    assert gpu.gap(found, wanted[1]) <= FP32


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("fused", ["on", "off"])
def test_bf16_is_near_fp32_in_both_kinds_of_layers(wanted: Any, plan: str, impl: str, fused: str):
    if impl == "transformer_engine" and not has_transformer_engine():
        pytest.skip("Transformer Engine is not installed")
    with gpu.one_gpu() as ranks:
        logps_R, found = two_passes(ranks, PLANS[plan], impl=impl, bf16=True, fused_logprobs=fused)
    torch.testing.assert_close(logps_R, wanted[0], rtol=5e-3, atol=0.5)
    assert 1e-5 < gpu.gap(found, wanted[1]) <= BF16


@pytest.mark.parametrize("plan", ["padded", "packed"])
def test_local_layers_do_not_make_the_host_wait_for_the_gpu(plan: str):
    """CUDA itself says so; the CPU's watch (tests/harness/sync_watch.py) only knows what it looks for."""
    with gpu.one_gpu() as ranks:
        policy = gpu.make_policy(ranks, bf16=True)
        planned = gpu.planned_batch(ranks, **PLANS[plan])
        given = (policy.engine, planned.microbatches, planned.batch, gpu.reference_of(planned), gpu.LOSS)
        accumulate_gradient(*given)  # kernels are chosen and compiled at their first use
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                accumulate_gradient(*given)
                during = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
                torch.ones(1, device="cuda").item()
            assert any("synchroniz" in str(warning.message) for warning in seen), "the mode sees nothing"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert during == []
