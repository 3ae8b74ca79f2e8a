"""Every layout does what one process does: loss, scores, coefficients, gradient, and weights after three updates.

The package runs float32 on real Megatron-Core; the other side is ``one_graph.py``: one process, float64, no Megatron.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from matrix import CASES, FULL_PRODUCT, LAYOUTS, TOLERANCE, measure
from rank_pool import RankPool


def check(pool: RankPool, name: str) -> None:
    found, allowed = asdict(measure(pool, (CASES | FULL_PRODUCT)[name])), asdict(TOLERANCE)
    broken = {quantity: gap for quantity, gap in found.items() if not gap <= allowed[quantity]}
    assert not broken, f"{name}: {broken}"


PADDED, PACKED = "mbs 2", "packed 100"
OF_ONE_KIND = ("one rank", "TP2", "TP2 SP", "TP4", "PP2", "PP2 VPP2", "PP4", "DP2", "DP4", "CP2", "CP4")
TAKES_TURNS = dict(zip((name for name in LAYOUTS if name not in OF_ONE_KIND), itertools.cycle((PADDED, PACKED))))
"""Layouts that are several kinds at once have one kind of microbatches by default; the other is slow."""


def default_and_slow() -> Iterator[Any]:
    for name in CASES:
        layout, microbatches, *others = name.split(", ")
        other = {PADDED: PACKED, PACKED: PADDED}.get(microbatches)
        slow = len(others) == 1 and TAKES_TURNS.get(layout) == other is not None
        yield pytest.param(name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("case", default_and_slow())
def test_layout_invariance(pool: RankPool, case: str):
    check(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in FULL_PRODUCT if name not in CASES])
def test_layout_invariance_of_the_full_product(pool: RankPool, case: str):
    check(pool, case)
