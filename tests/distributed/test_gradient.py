"""The gradient of the two passes is that of the coupled loss, on every layout.

The package runs float32 on real Megatron-Core; the other side is ``one_graph.py`` in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from group_samples import make_samples
from layout_case import MODELS, LayoutCase
from layout_run import RankResult, run_case, whole_tensors
from one_graph import OneGraphLoss
from parity import CP2, PP2, SP, TP2, VPP2, expected_of, graph_and_gradient, relative_gap, weights_of, worst_entry
from rank_pool import RankPool

OBJECTIVES = ("all_pairs", "mpo", "softmax", "margin", "dpo", "sft")
TOLERANCE = 1e-5


def check_gradient(pool: RankPool, case: LayoutCase) -> None:
    results: list[RankResult] = pool.run(case.num_ranks, run_case, case)
    start = weights_of(pool, case.model)
    for name, weight in whole_tensors([r.weights_before for r in results]).items():
        assert torch.equal(weight, start[name]), f"{name}: the layout starts from other weights"
    loss = tuple(sorted(case.loss_options.items()))
    graph, gradient = expected_of(pool, case.model, case.num_groups, loss)
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    assert relative_gap(found, gradient) <= TOLERANCE
    assert worst_entry(found, gradient) <= (TOLERANCE, "")
    if not case.coupled:
        check_losses(results, graph, case)


def check_losses(results: list[RankResult], graph: OneGraphLoss, case: LayoutCase) -> None:
    seen = [(r.losses[0], r.logps[0]) for r in results if r.losses]
    assert seen, "no rank reports a loss"
    for losses, logps_R in seen:
        assert losses["loss"] == pytest.approx(float(graph.loss.detach()), rel=TOLERANCE)
        assert losses["preference_loss"] == pytest.approx(float(graph.preference_loss.detach()), rel=TOLERANCE)
        assert losses["nll_loss"] == pytest.approx(float(graph.nll_loss.detach()), rel=TOLERANCE)
        np.testing.assert_allclose(logps_R, expected_logps(graph, case), rtol=TOLERANCE)
        assert losses["drift"] <= 1e-5


def expected_logps(graph: OneGraphLoss, case: LayoutCase) -> np.ndarray:
    """[R]: of the responses that the loss reads, in the order of the data."""
    loss = case.loss_options
    ids = []
    for sample in make_samples(case.num_groups):
        positive = sample.labels_K == 1
        reads = np.ones_like(positive)
        if loss["objective"] == "dpo":
            best = np.where(positive, sample.values_K, -np.inf).argmax()
            worst = np.where(positive, np.inf, sample.values_K).argmin()
            reads = np.isin(np.arange(len(positive)), [best, worst])
        if loss["objective"] == "sft":
            reads = positive
        elif positive.all():
            reads = reads & positive if loss["one_sided_nll"] else np.zeros_like(positive)
        ids += [sample.first_response_id + int(k) for k in np.flatnonzero(reads)]
    return np.array([float(graph.logps[response_id].detach()) for response_id in ids])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_pass_gradient_equals_coupled_one_graph_gradient(pool: RankPool, model: str, objective: str):
    check_gradient(pool, LayoutCase(model=model, loss={"objective": objective}))


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


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2-sequence-parallel": (2, {**TP2, **SP}),
    "PP2": (2, PP2),
    "PP2-VPP2": (2, {**PP2, **VPP2}),
    "DP2": (2, {}),
    "DP2-overlap": (2, {"overlap_grad_reduce": True}),
    "TP2xPP2": (4, {**TP2, **PP2}),
    "TP2xPP2-sequence-parallel": (4, {**TP2, **PP2, **SP}),
    "PP2xDP2": (4, PP2),
    "TP2xDP2": (4, TP2),
    "PP2-VPP2xDP2-overlap": (4, {**PP2, **VPP2, "overlap_grad_reduce": True}),
    "DP4": (4, {}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "CP2": (2, CP2),
    "CP2xDP2": (4, CP2),
    "CP4": (4, {"context_parallel_size": 4}),
    "TP2xCP2-sequence-parallel": (4, {**TP2, **CP2, **SP}),
    "PP2xCP2": (4, {**PP2, **CP2}),
    "PP2-VPP2xCP2": (4, {**PP2, **VPP2, **CP2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_gradient_is_the_same_on_every_layout(pool: RankPool, layout: str, model: str):
    num_ranks, parallel = LAYOUTS[layout]
    check_gradient(pool, LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model))


@pytest.mark.parametrize("micro_batch_size", [1, 4, 32])
def test_gradient_does_not_depend_on_the_micro_batch_size(pool: RankPool, micro_batch_size: int):
    check_gradient(pool, LayoutCase(micro_batch_size=micro_batch_size))
    check_gradient(pool, LayoutCase(num_ranks=4, parallel=PP2, micro_batch_size=micro_batch_size))


@pytest.mark.parametrize("layout", ["one rank", "TP2-sequence-parallel", "PP2-VPP2", "DP2", "PP2xCP2"])
@pytest.mark.parametrize("max_tokens", [None, 100], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", ["all_pairs", "nca"])
def test_the_coupled_backward_that_checks_and_benchmarks_use_has_the_gradient(
    pool: RankPool, layout: str, max_tokens: int | None, objective: str
):
    num_ranks, parallel = LAYOUTS.get(layout, (1, {}))
    loss = {"objective": objective}
    check_gradient(
        pool,
        LayoutCase(
            num_ranks=num_ranks, parallel=parallel, loss=loss, max_tokens_per_microbatch=max_tokens, coupled=True
        ),
    )


PACKED = (
    "one rank",
    "TP2-sequence-parallel",
    "PP2-VPP2",
    "DP4",
    "CP2",
    "TP2xCP2-sequence-parallel",
    "PP2xCP2",
    "CP2xDP2",
)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("model", ["llama", "gpt"])
@pytest.mark.parametrize("max_tokens", [32, 100])
def test_gradient_does_not_depend_on_packing(pool: RankPool, layout: str, model: str, max_tokens: int):
    num_ranks, parallel = LAYOUTS.get(layout, (1, {}))
    check_gradient(
        pool,
        LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model, max_tokens_per_microbatch=max_tokens),
    )


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("precision", [FULL, {"recompute_granularity": "selective"}], ids=["full", "selective"])
def test_gradient_does_not_depend_on_recomputation(pool: RankPool, precision: dict[str, Any]):
    check_gradient(pool, LayoutCase(precision=precision))
    check_gradient(pool, LayoutCase(num_ranks=4, parallel={**TP2, **PP2}, precision=precision))


def test_a_batch_with_fewer_responses_than_data_parallel_ranks_has_its_gradient(pool: RankPool):
    """Two ranks of four only fill the schedule."""
    check_gradient(pool, LayoutCase(num_ranks=4, num_groups=1, micro_batch_size=1))


@pytest.mark.parametrize("layout", ["one rank", "TP2-sequence-parallel", "PP2-VPP2", "DP2", "TP2xPP2"])
def test_bf16_gradient_is_that_of_the_rounded_weights_to_five_percent(pool: RankPool, layout: str):
    """A wrong factor or a lost microbatch is far outside."""
    num_ranks, parallel = LAYOUTS.get(layout, (1, {}))
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, precision={"bf16": True})
    results: list[RankResult] = pool.run(num_ranks, run_case, case)
    rounded = whole_tensors([r.weights_before for r in results])
    _, gradient = graph_and_gradient(rounded, case.model, case.num_groups, case.loss_options)
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    assert 1e-4 < relative_gap(found, gradient) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradient_of_the_full_product(pool: RankPool, layout: str, objective: str, model: str, micro_batch_size: int):
    num_ranks, parallel = LAYOUTS[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model, loss={"objective": objective})
    check_gradient(pool, replace(case, micro_batch_size=micro_batch_size))
