"""Several updates on any layout and optimizer give the weights that the one graph gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from group_samples import make_samples, reference_logps
from layout_case import MODELS, LayoutCase
from layout_run import RankResult, run_case, whole_tensors
from one_graph import trained
from parity import DISTRIBUTED_OPTIMIZER, PP2, SP, TP2, VPP2, relative_gap, weights_of
from rank_pool import RankPool

NUM_STEPS, NUM_GROUPS = 3, 4
# clip_grad is below the gradient's norm, so that clipping acts; adam_eps is so large that Adam does not turn the
# rounding of near-zero gradients into whole steps.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {
        "optimizer": "adam",
        "lr": 0.02,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-2,
    },
    "sgd": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0, "sgd_momentum": 0.9},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "DP2": (2, {}),
    "TP2xPP2-sequence-parallel": (4, {**TP2, **PP2, **SP}),
    "PP2xDP2": (4, PP2),
}
SHARDED: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, DISTRIBUTED_OPTIMIZER),
    "DP2": (2, DISTRIBUTED_OPTIMIZER),
    "DP2-overlap": (2, {**DISTRIBUTED_OPTIMIZER, "overlap_grad_reduce": True}),
    "DP4": (4, DISTRIBUTED_OPTIMIZER),
    "TP2xDP2": (4, {**TP2, **DISTRIBUTED_OPTIMIZER}),
    "PP2-VPP2xDP2": (4, {**PP2, **VPP2, **DISTRIBUTED_OPTIMIZER}),
}


@cache
def expected(pool: RankPool, model: str, optimizer: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    samples = make_samples(NUM_STEPS * NUM_GROUPS)
    batches = [samples[start : start + NUM_GROUPS] for start in range(0, len(samples), NUM_GROUPS)]
    loss = LayoutCase().loss_options
    start = weights_of(pool, model)
    return trained(start, MODELS[model], batches, reference_logps(samples), loss, optimizer=OPTIMIZERS[optimizer])


def check_updates(pool: RankPool, num_ranks: int, parallel: dict[str, Any], optimizer: str, model: str) -> None:
    case = LayoutCase(
        num_ranks=num_ranks,
        parallel=parallel,
        model=model,
        optimizer=OPTIMIZERS[optimizer],
        num_steps=NUM_STEPS,
        num_groups=NUM_GROUPS,
    )
    results: list[RankResult] = pool.run(num_ranks, run_case, case)
    weights, losses, norms = expected(pool, model, optimizer)
    assert min(norms) > OPTIMIZERS[optimizer]["clip_grad"], "clipping must act in this test"
    for result in results:
        assert result.grad_norms == pytest.approx(norms, rel=1e-4)
        if result.losses:
            assert [step["loss"] for step in result.losses] == pytest.approx(losses, rel=1e-4)
    start = weights_of(pool, model)
    found = whole_tensors([r.weights_after for r in results])
    moved = {name: weight - start[name] for name, weight in weights.items()}
    assert relative_gap({name: weight - start[name] for name, weight in found.items()}, moved) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_after_three_updates_are_those_of_the_one_graph(pool: RankPool, layout: str, optimizer: str):
    num_ranks, parallel = LAYOUTS[layout]
    check_updates(pool, num_ranks, parallel, optimizer, "llama")


@pytest.mark.parametrize("layout", SHARDED)
def test_the_distributed_optimizer_makes_the_same_updates(pool: RankPool, layout: str):
    num_ranks, parallel = SHARDED[layout]
    check_updates(pool, num_ranks, parallel, "adam", "llama")


@pytest.mark.parametrize("layout", ["one rank", "TP2xPP2-sequence-parallel"])
def test_norms_and_biases_get_no_weight_decay(pool: RankPool, layout: str):
    """The model with biases; one_graph.py decays matrices alone."""
    num_ranks, parallel = LAYOUTS[layout]
    check_updates(pool, num_ranks, parallel, "adam", "gpt")


@pytest.mark.parametrize("model", MODELS)
def test_the_digest_of_the_weights_does_not_depend_on_the_layout(pool: RankPool, model: str):
    """Nor does it change without an update; one update of 1e-6 changes it."""
    digests = set()
    for num_ranks, parallel in (LAYOUTS["one rank"], LAYOUTS["TP2xPP2-sequence-parallel"], SHARDED["PP2-VPP2xDP2"]):
        case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model, num_groups=1)
        for result in pool.run(num_ranks, run_case, case):
            digests |= {result.digest_before, result.digest_after}
    assert len(digests) == 1
    case = LayoutCase(model=model, num_groups=1, optimizer={"optimizer": "sgd", "lr": 1e-6})
    (result,) = pool.run(1, run_case, case)
    assert {result.digest_before} == digests
    assert result.digest_after not in digests
