"""Which groups a verification of the gradient takes, and how it measures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from step_batches import make_batch, options

from megatron_groupdpo.data.batches.planner import PlanOptions
from megatron_groupdpo.engine import GradientPiece
from megatron_groupdpo.step import verify
from megatron_groupdpo.step.verify import GradientGap, choose_groups, compare_gradients

SIDES = ((6, 6), (1, 1), (0, 2), (2, 2), (2, 0), (1, 1), (2, 1))
"""Tokens a whole-group microbatch grow with the responses; groups 2 and 4 have no preference term."""


def chosen(data_parallel_size: int, *, micro_batch_size: int = 1, objective: str = "all_pairs") -> list[int]:
    loss = options(objective)
    plan = PlanOptions(micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    return choose_groups(make_batch(loss, SIDES), plan, loss)


def test_the_smallest_active_groups_are_taken_one_a_data_parallel_rank():
    assert chosen(1) == [1, 5], "two where there are two, so that the mean over groups is seen"
    assert chosen(3, micro_batch_size=12) == [1, 5, 6]
    assert chosen(4, micro_batch_size=12) == [1, 3, 5, 6]
    assert chosen(8, micro_batch_size=12) == [0, 1, 3, 5, 6], "all that are active"


def test_groups_that_need_more_memory_than_a_live_microbatch_are_left_out():
    assert chosen(8, micro_batch_size=4) == [1, 3, 5, 6]
    assert 0 not in chosen(8, micro_batch_size=1)


def test_sft_is_verified_on_groups_with_a_positive():
    assert 2 not in chosen(8, micro_batch_size=12, objective="sft")
    assert 4 in chosen(8, micro_batch_size=12, objective="sft")


def test_nothing_is_taken_where_no_group_is_active():
    loss = options()
    plan = PlanOptions(micro_batch_size=1, data_parallel_size=2)
    assert choose_groups(make_batch(loss, ((0, 2), (2, 0))), plan, loss) == []


@pytest.mark.parametrize(
    ("tokens", "capacity", "ranks", "wanted"),
    [
        ([10, 20, 21, 30], 5, 4, [0, 1]),  # at most twice the smallest
        ([30, 20, 21, 10], 21, 4, [1, 2, 3]),  # or what a live microbatch holds, in the batch's order
        ([10, 15, 12, 11], 5, 1, [0, 3]),  # two, the smallest first
        ([10, 15, 12, 11], 5, 3, [0, 2, 3]),
        ([0, 50, 0, 0], 5, 4, [1]),  # a group without a pass is none
    ],
)
def test_which_sizes_are_taken(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int], capacity: int, ranks: int, wanted: list[int]
):
    loss = options()
    monkeypatch.setattr(verify, "whole_group_tokens", lambda batch, plan: tokens)
    monkeypatch.setattr(verify, "microbatch_capacity", lambda batch, plan: capacity)
    plan = PlanOptions(micro_batch_size=1, data_parallel_size=ranks)
    assert choose_groups(make_batch(loss, ((1, 1),) * 4), plan, loss) == wanted


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gap_of(
    ours: list[list[float]], theirs: list[list[float]], weights: list[float], names: str = "p0 p1 p2 p3"
) -> GradientGap:
    buffers = [torch.zeros(len(values)) for values in ours]

    def fill(values: list[list[float]]) -> None:
        for buffer, own in zip(buffers, values):
            buffer.copy_(torch.tensor(own))

    def pieces() -> Iterator[GradientPiece]:
        for name, buffer, weight in zip(names.split(), buffers, weights):
            yield GradientPiece(name=name, values=buffer, weight=weight)

    return compare_gradients(lambda: fill(ours), lambda: fill(theirs), pieces, device=torch.device("cpu"))


def test_the_gap_is_the_norm_of_the_difference_over_that_of_the_one_graph(world_of_one: None):
    gap = gap_of([[3.0, 4.0], [1.0]], [[3.0, 4.5], [0.0]], [1.0, 0.25])
    assert gap.decoupled_norm == pytest.approx(math.sqrt(25 + 0.25))
    assert gap.coupled_norm == pytest.approx(math.sqrt(9 + 4.5**2))
    assert gap.difference_norm == pytest.approx(math.sqrt(0.25 + 0.25))
    assert gap.relative == pytest.approx(gap.difference_norm / gap.coupled_norm)


def test_the_worst_parameter_is_named(world_of_one: None):
    assert gap_of([[1.0], [1.0]], [[1.5], [2.0]], [1.0, 1.0]).worst == "p1"
    assert gap_of([[1.0], [1.0]], [[1.5], [2.0]], [1.0, 0.1]).worst == "p0"
    assert gap_of([[math.nan], [1.0]], [[1.5], [2.0]], [1.0, 1.0]).worst == "p0"
    assert gap_of([[1.0], [math.nan]], [[1.5], [2.0]], [1.0, 1.0]).worst == "p1"


def test_the_pieces_of_a_parameter_count_together(world_of_one: None):
    assert gap_of([[3.0], [4.0], [3.0]], [[0.0]] * 3, [1.0] * 3, names="a b a").worst == "a"
    assert gap_of([[3.0], [5.0], [3.0]], [[0.0]] * 3, [1.0] * 3, names="a b a").worst == "b"


def test_the_pieces_of_all_ranks_count_together(monkeypatch: pytest.MonkeyPatch, world_of_one: None):
    """A second rank that has the same pieces of ``a``, and none of ``b``."""

    def gather(everyones: list[dict[str, float]], own: dict[str, float]) -> None:
        everyones[:] = [own, {"a": own["a"]}]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for ours, worst in ((3.0, "a"), (4.5, "b")):
        assert gap_of([[3.0], [ours]], [[0.0], [0.0]], [1.0, 1.0], names="a b").worst == worst
    assert gap_of([[0.1], [0.5]], [[0.0], [0.0]], [1.0, 1.0], names="a b").worst == "b"


def test_norms_are_summed_in_float64(world_of_one: None):
    gap = gap_of([[1.0, 1e-5]], [[0.0, 0.0]], [1.0])
    assert gap.decoupled_norm == pytest.approx(math.sqrt(1 + 1e-10), rel=1e-14)
    gap = gap_of([[1.0], [1e-5]], [[0.0], [0.0]], [1.0, 1.0])
    assert gap.decoupled_norm == pytest.approx(math.sqrt(1 + 1e-10), rel=1e-14)


def test_both_sides_must_have_the_same_pieces(world_of_one: None):
    sizes = iter([2, 1])

    def pieces() -> Iterator[GradientPiece]:
        return (GradientPiece(name=f"p{i}", values=torch.ones(1), weight=1.0) for i in range(next(sizes)))

    with pytest.raises(ValueError, match="shorter"):
        compare_gradients(lambda: None, lambda: None, pieces, device=torch.device("cpu"))


def test_a_gradient_where_the_one_graph_has_none_is_no_agreement(world_of_one: None):
    assert gap_of([[1.0]], [[0.0]], [1.0]).relative == math.inf
    assert gap_of([[0.0]], [[0.0]], [1.0]).relative == 0.0
    assert math.isnan(gap_of([[math.nan]], [[1.0]], [1.0]).relative)
