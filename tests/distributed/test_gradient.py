"""The gradient of the two passes is that of the coupled loss, on every layout.

The package runs float32 on real Megatron-Core; the other side is ``one_graph.py`` in float64.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from layout_case import DENSE, LayoutCase
from layout_run import RankResult, run_case, whole_tensors
from matrix import LAYOUTS
from one_graph import OneGraphLoss
from one_graph_phi import PHI
from parity import expected_of, graph_and_gradient, relative_gap, weights_of, worst_entry
from rank_pool import RankPool

from megatron_groupdpo.objectives import OBJECTIVES

TOLERANCE = 1e-5
SOME = ("one rank", "TP2", "TP4", "TP2 SP", "PP2", "PP2 VPP2", "DP2", "CP2", "TP2 PP2", "TP2 CP2 SP", "PP2 CP2")


def slow(*values: str) -> Any:
    """A case of `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


PAIRS = [
    (model, objective) if model == DENSE[0] or objective == "softmax" else slow(model, objective)
    for model in DENSE
    for objective in OBJECTIVES
]


def check_gradient(pool: RankPool, case: LayoutCase) -> None:
    results: list[RankResult] = pool.run(case.num_ranks, run_case, case)
    start = weights_of(pool, case.model)
    for name, weight in whole_tensors([r.weights_before for r in results]).items():
        assert torch.equal(weight, start[name]), f"{name}: the layout starts from other weights"
    graph, gradient = expected_of(pool, case.model, case.num_groups, json.dumps(case.loss_options))
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    assert relative_gap(found, gradient) <= TOLERANCE
    assert worst_entry(found, gradient) <= (TOLERANCE, "")
    if not case.coupled:
        check_losses(results, graph)


def on(layout: str) -> dict[str, Any]:
    num_ranks, parallel = LAYOUTS[layout]
    return {"num_ranks": num_ranks, "parallel": parallel}


def check_losses(results: list[RankResult], graph: OneGraphLoss) -> None:
    seen = [(r.losses[0], r.logps[0]) for r in results if r.losses]
    assert seen, "no rank reports a loss"
    for losses, logps_R in seen:
        assert losses["loss"] == pytest.approx(float(graph.loss.detach()), rel=TOLERANCE)
        assert losses["preference_loss"] == pytest.approx(float(graph.preference_loss.detach()), rel=TOLERANCE)
        assert losses["nll_loss"] == pytest.approx(float(graph.nll_loss.detach()), rel=TOLERANCE)
        wanted_R = [float(graph.logps[response_id].detach()) for response_id in graph.read]
        np.testing.assert_allclose(logps_R, wanted_R, rtol=TOLERANCE)
        assert losses["drift"] <= 1e-5


@pytest.mark.parametrize(("model", "objective"), PAIRS)
def test_two_pass_gradient_equals_coupled_one_graph_gradient(pool: RankPool, model: str, objective: str):
    check_gradient(pool, LayoutCase(model=model, loss={"objective": objective}))


def test_every_objective_has_a_second_implementation():
    assert set(PHI) == set(OBJECTIVES)


@pytest.mark.parametrize("nll_average", ["sum", "response", "batch-tokens"])
@pytest.mark.parametrize("score_average", [False, True])
@pytest.mark.parametrize("one_sided_nll", [False, True])
def test_gradient_holds_for_sums_and_means_of_log_probs(
    pool: RankPool, nll_average: str, score_average: bool, one_sided_nll: bool
):
    loss = {"nll_average": nll_average, "score_average": score_average, "one_sided_nll": one_sided_nll}
    check_gradient(pool, LayoutCase(loss=loss))


@pytest.mark.parametrize("objective", ["nca", "group_bce"])
def test_a_separable_objective_has_its_gradient_from_the_second_pass_alone(pool: RankPool, objective: str):
    check_gradient(pool, LayoutCase(loss={"objective": objective, "one_sided_nll": objective == "nca"}))


@pytest.mark.parametrize("layout", [name if name in SOME else slow(name) for name in LAYOUTS])
def test_gradient_of_a_model_with_biases_and_learned_positions(pool: RankPool, layout: str):
    """The matrix of ``test_layout_invariance.py`` runs the other one."""
    check_gradient(pool, LayoutCase(**on(layout), model="gpt"))


@pytest.mark.parametrize("layout", ["one rank", "PP2 VPP2", "DP4", "CP2", "TP2 CP2 SP", "PP2 CP2"])
def test_packed_gradient_of_a_model_with_biases_and_learned_positions(pool: RankPool, layout: str):
    check_gradient(pool, LayoutCase(**on(layout), model="gpt", max_tokens_per_microbatch=100))


@pytest.mark.parametrize("layout", ["TP4", "PP2 VPP2", "PP4", "TP2 CP2 SP"])
def test_gradient_of_a_model_with_an_output_layer_of_its_own(pool: RankPool, layout: str):
    check_gradient(pool, LayoutCase(**on(layout), model="llama-untied"))


@pytest.mark.parametrize("layout", ["one rank", "TP2 SP", "PP2 VPP2", "DP2", "PP2 CP2"])
@pytest.mark.parametrize("max_tokens", [None, 100], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", ["all_pairs", slow("nca")])
def test_the_coupled_backward_that_checks_and_benchmarks_use_has_the_gradient(
    pool: RankPool, layout: str, max_tokens: int | None, objective: str
):
    loss = {"objective": objective}
    check_gradient(
        pool,
        LayoutCase(**on(layout), loss=loss, max_tokens_per_microbatch=max_tokens, coupled=True),
    )


def test_a_batch_with_fewer_responses_than_data_parallel_ranks_has_its_gradient(pool: RankPool):
    """Two ranks of four only fill the schedule."""
    check_gradient(pool, LayoutCase(num_ranks=4, num_groups=1, micro_batch_size=1))


@pytest.mark.parametrize("layout", ["one rank", "TP2 SP", "PP2 VPP2", "DP2", "TP2 PP2", "CP2"])
def test_bf16_gradient_is_that_of_the_rounded_weights_to_five_percent(pool: RankPool, layout: str):
    """A wrong factor or a lost microbatch is far outside."""
    case = LayoutCase(**on(layout), precision={"bf16": True})
    results: list[RankResult] = pool.run(case.num_ranks, run_case, case)
    rounded = whole_tensors([r.weights_before for r in results])
    _, gradient = graph_and_gradient(rounded, case.model, case.num_groups, case.loss_options)
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    assert 1e-4 < relative_gap(found, gradient) <= 0.05
