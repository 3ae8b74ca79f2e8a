"""Runs on the ranks: steps with captured layers, and the same steps without."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from graph_stand_in import StandIn, graphs_on_a_cpu
from layout_case import SEQ_LENGTH, LayoutCase
from layout_run import RankResult, run_case

GRAPHS: dict[str, Any] = {"cuda_graphs": True, "cuda_graph_length_multiple": 8, "cuda_graph_shapes": 4}
"""At most three lengths of at most 24 tokens: every shape is captured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank's run, and what the stand-in saw."""

    result: RankResult
    num_sets: int
    replays: Mapping[str, int]


def captured(case: LayoutCase) -> Seen:
    """The case with graphs."""
    made: list[StandIn] = []

    def make() -> StandIn:
        made.append(StandIn())
        return made[-1]

    with graphs_on_a_cpu(make):
        result = run_case(case)
    (one,) = made
    assert not one.pool.open
    return Seen(result=result, num_sets=one.num_sets, replays=one.pool.replays)


def uncaptured(case: LayoutCase) -> RankResult:
    """The case's microbatches, the layers themselves."""
    with graphs_on_a_cpu(lambda: lambda layers, _sample_args: layers):
        return run_case(case)


def with_graphs(case: LayoutCase, **changes: Any) -> LayoutCase:
    """The case with the options set."""
    assert SEQ_LENGTH == 3 * GRAPHS["cuda_graph_length_multiple"]
    return dataclasses.replace(case, precision=GRAPHS | dict(case.precision) | changes)
