"""Memory of the decoupled backward does not depend on the size of a group; that of the coupled one does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from layout_case import MODELS
from memory_rank import Layout, Point, law_breaks, measure_layout
from rank_pool import RankPool

SIZES = (2, 16)
LAYOUTS = {
    "PP1": Layout(name="PP1", lengths=(12,), group_sizes=SIZES, num_groups=4, prompt_length=4, model=MODELS["llama"]),
}
LAYOUTS["PP2"] = replace(LAYOUTS["PP1"], name="PP2", pipeline=2)
LAYOUTS["PP2-VPP2"] = replace(LAYOUTS["PP2"], name="PP2-VPP2", chunks=2)
LAYOUTS["PP2-recompute"] = replace(LAYOUTS["PP2"], name="PP2-recompute", recompute=True)


def measured(pool: RankPool, name: str) -> list[Point]:
    layout = LAYOUTS[name]
    return [point for points in pool.run(layout.pipeline, measure_layout, layout) for point in points]


def saved(point: Point) -> int:
    return point.peak_saved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_bytes_are_flat_in_group_size_decoupled_and_grow_coupled(pool: RankPool, layout: str):
    points = measured(pool, layout)
    decoupled = [point for point in points if point.mode == "decoupled"]
    assert law_breaks(decoupled, value=saved) == []
    assert {(point.group_size, point.num_microbatches) for point in decoupled} == {(2, 4), (16, 32)}
    assert all(point.num_saved_scoring == 0 for point in decoupled)
    for stage in {point.stage for point in points}:
        small, large = sorted(
            (point for point in points if point.mode == "coupled" and point.stage == stage), key=lambda p: p.group_size
        )
        assert small.num_microbatches == large.num_microbatches == 4
        assert large.peak_saved > 4 * small.peak_saved
        # The law's check does see growth: the coupled plan in the decoupled one's place breaks it.
        assert law_breaks([replace(p, mode="decoupled", num_saved_scoring=0) for p in (small, large)], value=saved)


@pytest.mark.parametrize("layout", ["PP1", "PP2", "PP2-VPP2"])
def test_a_stage_holds_what_its_microbatches_in_flight_save(pool: RankPool, layout: str):
    """min(PP - stage, M) microbatches, by chunk when interleaved; beside them the loss's own few vectors."""
    for point in measured(pool, layout):
        assert point.expected_saved <= point.peak_saved <= 1.02 * point.expected_saved, point
