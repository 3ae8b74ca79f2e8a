"""Every layout does what one process does: loss, scores, coefficients, gradient, and weights after three updates.

The package runs float32 on real Megatron-Core; the other side is ``one_graph.py``: one process, float64, no Megatron.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
from matrix import CASES, FULL_PRODUCT, TOLERANCE, measure
from rank_pool import RankPool


def check(pool: RankPool, name: str) -> None:
    found, allowed = asdict(measure(pool, (CASES | FULL_PRODUCT)[name])), asdict(TOLERANCE)
    broken = {quantity: gap for quantity, gap in found.items() if not gap <= allowed[quantity]}
    assert not broken, f"{name}: {broken}"


@pytest.mark.parametrize("case", CASES)
def test_layout_invariance(pool: RankPool, case: str):
    check(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in FULL_PRODUCT if name not in CASES])
def test_layout_invariance_of_the_full_product(pool: RankPool, case: str):
    check(pool, case)
