"""The bodies of the GPU tests, on the CPU in fp32 and bf16: what they compare agrees there."""

from __future__ import annotations

import pytest
from rank_pool import RankPool
from two_pass_case import contract, packed_against_padded


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 5e-2)])
def test_packed_is_padded(pool: RankPool, bf16: bool, tolerance: float):
    (result,) = pool.run(1, packed_against_padded, "cpu", {"bf16": bf16}, "local")
    assert result["logp_gap"] < tolerance
    assert result["gap"] < tolerance


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 1e-1)])
def test_the_contract_holds_without_fp8(pool: RankPool, bf16: bool, tolerance: float):
    (result,) = pool.run(1, contract, "cpu", {"bf16": bf16})
    assert max(result["drifts"]) == 0.0
    assert result["gap"] < tolerance
    assert result["repeats"]
    assert result["repeats_gradient"] == 0.0
