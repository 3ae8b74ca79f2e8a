"""Captured layers compute what the layers compute, in both passes, and no replay reads what another left.

PyTorch's capture needs a GPU (tests/gpu/test_cuda_graphs_gpu.py); here a stricter stand-in takes its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_case
import pytest
from graph_case import GRAPHS, Seen, check_bits, with_graphs
from layout_case import LayoutCase
from matrix import ADAM, NUM_GROUPS, NUM_STEPS, OVERLAP, SGD, TOLERANCE, measure
from parity import DISTRIBUTED_OPTIMIZER, SP, TP2
from rank_pool import RankPool, RanksFailed
from tiny_run import TinyData, read_metrics, train_on_rank
from two_pass_case import WINDOWED

ConfigFile = Callable[..., Path]


def on(num_ranks: int = 1, parallel: dict[str, Any] | None = None, **case: Any) -> LayoutCase:
    defaults: dict[str, Any] = {"optimizer": SGD, "num_steps": NUM_STEPS, "num_groups": NUM_GROUPS}
    return with_graphs(LayoutCase(num_ranks=num_ranks, parallel=parallel or {}, **(defaults | case)))


# Buckets so small that each layer has several.
SHARDED: dict[str, Any] = {**DISTRIBUTED_OPTIMIZER, **OVERLAP, "ddp_bucket_size": 2000}
CASES = {
    "one rank": on(),
    "biases, LayerNorm, learned positions": on(model="gpt", micro_batch_size=4),
    "TP2 SP": on(2, {**TP2, **SP}, loss={"objective": "mpo"}),
    "DP2 overlap": on(2, OVERLAP, loss={"objective": "softmax"}),
    "DP2 distributed optimizer, overlap": on(2, SHARDED, optimizer=ADAM),
    "no scoring pass": on(loss={"objective": "nca"}),
}


@pytest.mark.parametrize("name", [*CASES, "bf16"])
def test_steps_with_captured_layers_are_the_layers_own_bit_for_bit(pool: RankPool, name: str):
    case = with_graphs(CASES["one rank"], bf16=True) if name == "bf16" else CASES[name]
    captured: list[Seen] = pool.run(case.num_ranks, graph_case.captured, case)
    check_bits(captured, pool.run(case.num_ranks, graph_case.uncaptured, case))
    passes = 1 if name == "no scoring pass" else 2
    for seen in captured:
        assert seen.replays["backward"] > 0
        assert seen.replays["forward"] == passes * seen.replays["backward"], "both passes replay"


@pytest.mark.parametrize("name", ["one rank", "TP2 SP", "DP2 distributed optimizer, overlap"])
def test_three_steps_with_captured_layers_are_those_of_the_one_graph(pool: RankPool, name: str):
    found = dataclasses.asdict(measure(pool, CASES[name], graph_case.layout))
    allowed = dataclasses.asdict(TOLERANCE)
    assert {n: v for n, v in found.items() if not v <= allowed[n]} == {}


@pytest.mark.parametrize(
    ("precision", "model", "num_shapes"),
    [({}, {}, 2), ({"bf16": True}, {}, 2), ({}, WINDOWED, 2), ({"cuda_graph_shapes": 1}, {}, 1)],
    ids=["fp32", "bf16", "windows", "beyond the limit"],
)
def test_the_body_of_the_gpu_tests_holds_here(
    pool: RankPool, precision: dict[str, Any], model: dict[str, Any], num_shapes: int
):
    (found,) = pool.run(1, graph_case.against_layers, precision, model)
    assert found["num_shapes"] == num_shapes
    for name in ("drifts", "logp_gaps", "gaps"):
        assert found[name] == [0.0] * 3, name
    assert len(set(found["norms"])) == 3


@pytest.mark.acts(
    "PrecisionConfig.cuda_graphs",
    "PrecisionConfig.cuda_graph_shapes",
    reason="a stand-in captures on the CPU; tests/gpu capture on a device",
)
def test_a_shape_beyond_the_limit_runs_uncaptured_and_says_so_once(pool: RankPool):
    case = with_graphs(CASES["one rank"], cuda_graph_shapes=1)
    ((seen, lines),) = pool.run(1, graph_case.result_and_notes, case)
    check_bits([seen], pool.run(1, graph_case.uncaptured, case), num_sets=1)
    (line,) = lines
    assert "1 shapes are captured, and a microbatch of 2 rows has another length" in line
    assert "--cuda-graph-shapes" in line
    ((_, lines),) = pool.run(1, graph_case.result_and_notes, CASES["one rank"])
    assert lines == []


@pytest.mark.costly
def test_only_the_logger_rank_says_so(pool: RankPool):
    case = with_graphs(CASES["TP2 SP"], cuda_graph_shapes=1)
    assert [len(lines) for _, lines in pool.run(2, graph_case.result_and_notes, case)] == [1, 0]


def test_the_one_graph_runs_uncaptured_and_agrees(pool: RankPool):
    """Else --verify-gradients would compare graphs with themselves, and use up shapes."""
    (found,) = pool.run(1, graph_case.one_graph_runs_uncaptured)
    assert found["replays"] == 0
    assert 1 <= found["sets"] <= 4
    assert found["gap"] <= 1e-5


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("a hook in a layer", "hooks in a captured layer would not run"),
        ("a hook before a layer's backward", "hooks in a captured layer would not run"),
        ("a moved weight", "a weight was moved after its layer was captured"),
        ("two microbatches in flight", "a microbatch begins before the backward"),
    ],
)
def test_what_a_graph_cannot_see_stops_the_step(pool: RankPool, how: str, why: str):
    with pytest.raises(RanksFailed, match=why):
        pool.run(1, graph_case.broken, how)


def test_the_stand_in_sees_an_output_that_is_read_too_late(pool: RankPool):
    assert pool.run(1, graph_case.broken, "an output read too late") == ["NaN"]


def test_graphs_keep_the_gather_buffer_they_know(pool: RankPool):
    assert pool.run(1, graph_case.a_larger_buffer_leaves_the_captured_one) == [True]


def test_gradient_nodes_of_weights_are_not_made_in_the_default_stream(pool: RankPool):
    """Megatron's hooks keep them, and a backward that is captured would make the default stream wait for it."""
    apart = ["own waits for current", "in own", "hooks", "out of own", "current waits for own"]
    assert pool.run(1, graph_case.streams_of_gradient_hooks, True) == [apart]
    assert pool.run(1, graph_case.streams_of_gradient_hooks, False) == [["hooks"]]


def test_sampling_goes_around_the_graphs(pool: RankPool):
    assert pool.run(1, graph_case.sampled_alike) == [True]


NO_WARMUP = {"lr_warmup_iters": 0}
LENGTHS = {**GRAPHS, "cuda_graph_length_multiple": 16}


@pytest.mark.costly
def test_a_whole_run_with_its_proofs_is_the_layers_own_bit_for_bit(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path
):
    digests = []
    for graphs in (True, False):
        save = tmp_path / str(graphs)
        config = config_file(
            parallel={"device": "auto", **DISTRIBUTED_OPTIMIZER, **OVERLAP},
            precision=LENGTHS,
            training={"train_iters": 3, "verify_gradients": 2, "score_drift_threshold": 1e-9},
            checkpoint={"save": str(save)},
        )
        digests += pool.run(2, graph_case.trained, ["--config", str(config)], graphs)
        assert [line["gradient_gap"] <= 1e-5 for line in read_metrics(save) if line.get("gradient_gap")]
    assert len(set(digests)) == 1


@pytest.mark.costly
def test_a_swapped_reference_is_scored_through_the_policys_graphs(
    pool: RankPool, config_file: ConfigFile, tiny_data: TinyData, tmp_path: Path
):
    start, digests = tmp_path / "start", []
    first = config_file(checkpoint={"save": str(start)}, training={"train_iters": 1}, optimizer=NO_WARMUP)
    pool.run(1, train_on_rank, ["--config", str(first)])
    objective = {"reference": "resident", "reference_logprobs": None}
    for graphs, offload in ((True, True), (True, False), (False, True)):
        config = config_file(
            parallel={"device": "auto"},
            precision=LENGTHS,
            training={"train_iters": 3},
            optimizer=NO_WARMUP,
            objective=objective | {"reference_offload": offload},
            checkpoint={"pretrained_checkpoint": str(start), "save": str(tmp_path / f"{graphs}{offload}")},
        )
        digests += pool.run(1, graph_case.trained, ["--config", str(config)], graphs)
    assert len(set(digests)) == 1
