"""The gradient of the two passes is that of the coupled loss, on every layout.

The package runs float32 on real Megatron-Core; the other side is ``one_graph.py`` in float64.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from group_samples import make_samples, reference_logps
from layout_case import MODELS, LayoutCase
from layout_run import RankResult, run_case, whole_tensors
from one_graph import OneGraphLoss, coupled_loss
from rank_pool import RankPool

OBJECTIVES = ("all_pairs", "mpo", "softmax", "margin", "dpo", "sft")
TOLERANCE = 1e-5


@cache
def weights_of(pool: RankPool, model: str) -> dict[str, torch.Tensor]:
    (result,) = pool.run(1, run_case, LayoutCase(model=model, num_groups=1))
    return whole_tensors([result.weights_before])


@cache
def expected(
    pool: RankPool, model: str, num_groups: int, loss: tuple[tuple[str, Any], ...]
) -> tuple[OneGraphLoss, dict[str, torch.Tensor]]:
    """Loss and gradient of the one graph."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights_of(pool, model).items()}
    samples = make_samples(num_groups)
    graph = coupled_loss(leaves, MODELS[model], samples, reference_logps(samples), dict(loss))
    graph.loss.backward()
    return graph, {name: leaf.grad if leaf.grad is not None else leaf.detach() * 0 for name, leaf in leaves.items()}


def check_gradient(pool: RankPool, case: LayoutCase, *, tolerance: float = TOLERANCE) -> None:
    results: list[RankResult] = pool.run(case.num_ranks, run_case, case)
    start = weights_of(pool, case.model)
    for name, weight in whole_tensors([r.weights_before for r in results]).items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=0 if not case.precision.get("bf16") else 1e-2)
    graph, gradient = expected(pool, case.model, case.num_groups, tuple(sorted(case.loss_options.items())))
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    check_against(found, gradient, tolerance)
    check_losses(results, graph, case, tolerance)


def check_against(found: dict[str, torch.Tensor], gradient: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == gradient.keys()
    norm = float(sum(g.square().sum() for g in gradient.values())) ** 0.5
    gap = float(sum((found[name] - g).square().sum() for name, g in gradient.items())) ** 0.5
    assert gap <= tolerance * norm, f"||difference|| / ||gradient|| = {gap / norm:.2e}"
    largest = max(float(g.abs().max()) for g in gradient.values())
    for name, g in gradient.items():
        worst = float((found[name] - g).abs().max()) / largest
        assert worst <= tolerance, f"{name}: {worst:.2e} of the largest entry"


def check_losses(results: list[RankResult], graph: OneGraphLoss, case: LayoutCase, tolerance: float) -> None:
    seen = [(r.losses[0], r.logps[0]) for r in results if r.losses]
    assert seen, "no rank reports a loss"
    for losses, logps_R in seen:
        assert losses["loss"] == pytest.approx(float(graph.loss.detach()), rel=tolerance)
        assert losses["preference_loss"] == pytest.approx(float(graph.preference_loss.detach()), rel=tolerance)
        assert losses["nll_loss"] == pytest.approx(float(graph.nll_loss.detach()), rel=tolerance)
        np.testing.assert_allclose(logps_R, expected_logps(graph, case), rtol=tolerance)
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


TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2-sequence-parallel": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, PP2),
    "PP2-VPP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "DP2-overlap": (2, {"overlap_grad_reduce": True}),
    "TP2xPP2": (4, {**TP2, **PP2}),
    "TP2xPP2-sequence-parallel": (4, {**TP2, **PP2, "sequence_parallel": True}),
    "PP2xDP2": (4, PP2),
    "TP2xDP2": (4, TP2),
    "PP2-VPP2xDP2-overlap": (4, {**PP2, "virtual_pipeline_model_parallel_size": 2, "overlap_grad_reduce": True}),
    "DP4": (4, {}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
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


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("precision", [FULL, {"recompute_granularity": "selective"}], ids=["full", "selective"])
def test_gradient_does_not_depend_on_recomputation(pool: RankPool, precision: dict[str, Any]):
    check_gradient(pool, LayoutCase(precision=precision))
    check_gradient(pool, LayoutCase(num_ranks=4, parallel={**TP2, **PP2}, precision=precision))


def test_a_batch_with_fewer_responses_than_data_parallel_ranks_has_its_gradient(pool: RankPool):
    """Two ranks of four only fill the schedule."""
    check_gradient(pool, LayoutCase(num_ranks=4, num_groups=1, micro_batch_size=1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradient_of_the_full_product(pool: RankPool, layout: str, objective: str, model: str, micro_batch_size: int):
    num_ranks, parallel = LAYOUTS[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model, loss={"objective": objective})
    check_gradient(pool, replace(case, micro_batch_size=micro_batch_size))
