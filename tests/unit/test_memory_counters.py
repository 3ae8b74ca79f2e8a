"""The counters that the memory laws are measured with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import allocations
from memory_counters import SavedBytes, expected_peak
from memory_rank import Point, law_breaks


def test_saved_bytes_count_unique_storages_until_the_graph_lets_go():
    x_S = torch.ones(100, requires_grad=True)
    with SavedBytes() as counter:
        y_S = x_S.exp()  # saves its result, 400 bytes
        assert counter.live == 400
        total = (y_S * y_S).sum() + (y_S[:3] * y_S[:3]).sum()  # the same storage, whole and in part
        assert counter.live == 400
        z_S = y_S.double().sin()  # saves the double, 800 bytes
        assert counter.live == 1200
        total.backward()
        assert counter.live == 800
        del z_S
    assert (counter.live, counter.peak, counter.num_saved) == (0, 1200, 6)


def test_a_saved_view_counts_the_storage_it_keeps():
    x_S = torch.ones(2, requires_grad=True)
    with SavedBytes() as counter:
        product_S = x_S * torch.ones(1000)[:2]  # only the view is saved, x needs no gradient beside it
    assert counter.peak == 4000
    del product_S


def test_excluded_tensors_and_no_grad_count_nothing():
    layer = torch.nn.Linear(30, 30)
    rows = torch.ones(5, 30)
    with SavedBytes(excluded=layer.parameters()) as counter:
        kept = layer(rows.requires_grad_())
        assert counter.peak == rows.numel() * 4
    with SavedBytes() as counter, torch.no_grad():
        layer(rows).exp()
    assert (counter.peak, counter.num_saved) == (0, 0)
    del kept


@pytest.mark.parametrize(
    ("chunks", "stage", "num_microbatches", "held"),
    [
        ([7], 0, 8, 4 * 7),
        ([7], 3, 8, 7),
        ([7], 0, 2, 2 * 7),
        # Two chunks: stage 0 warms up with 2 * 3 + 4 passes (chunks 0000 1111 00) and makes one more.
        ([1, 100], 0, 8, 7 * 1 + 4 * 100),
        ([1, 100], 0, 4, 4 * 1 + 4 * 100),
        ([1, 100], 3, 8, 4 * 1 + 1 * 100),
    ],
)
def test_expected_peak_counts_the_passes_in_flight(chunks: list[int], stage: int, num_microbatches: int, held: int):
    assert expected_peak(chunks, stage=stage, num_stages=4, num_microbatches=num_microbatches) == held


def test_allocations_see_temporaries_of_kernels_and_what_is_freed():
    def work() -> None:
        first = torch.empty(1000)
        del first
        torch.empty(500) + torch.empty(500)  # three of them at a time

    work()
    found = allocations(work)
    assert (found.peak, found.largest) == (6000, 4000)


def test_the_law_names_the_stage_and_group_size_that_break_it():
    base = Point(
        mode="decoupled",
        length=64,
        group_size=2,
        stage=1,
        num_microbatches=4,
        num_responses=8,
        peak_saved=1000,
        expected_saved=1000,
        num_saved_scoring=0,
    )

    def breaks(*points: Point) -> list[str]:
        return law_breaks(points, value=lambda point: point.peak_saved)

    assert breaks(base, replace(base, group_size=64, peak_saved=1020)) == []
    assert breaks(replace(base, group_size=64, mode="coupled", peak_saved=32000), base) == []
    (line,) = breaks(base, replace(base, group_size=64, peak_saved=1021))
    assert "64 tokens, stage 1: 1,021 bytes at N = 64, 1,000 at N = 2" in line
    with pytest.raises(AssertionError, match="scoring pass saved 3"):
        breaks(replace(base, num_saved_scoring=3))
