"""The layout-invariance matrix: one problem on every layout, against ``one_graph.py``.

``python tests/harness/matrix.py`` (``make invariance``) prints it as a table and keeps it under
``benchmarks/results/``; ``test_layout_invariance.py`` holds it to its tolerances.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import torch
from group_samples import make_samples, reference_logps
from layout_case import MODELS, LayoutCase
from layout_run import RankResult, run_case, whole_tensors
from one_graph import coupled_loss, trained
from parity import CP2, DISTRIBUTED_OPTIMIZER, EP2, PP2, SP, TP2, VPP2, relative_gap, weights_of, worst_entry
from rank_pool import RankPool

NUM_STEPS, NUM_GROUPS = 3, 6  # 18 responses in the first step: some layouts have microbatches to fill up
# clip_grad is below the gradient's norm, so that clipping acts; adam_eps is so large that Adam does not turn the
# rounding of near-zero gradients into whole steps.
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0, "sgd_momentum": 0.9}
ADAM = {
    "optimizer": "adam",
    "lr": 0.02,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-2,
}
TP4: dict[str, Any] = {"tensor_model_parallel_size": 4}
PP4: dict[str, Any] = {"pipeline_model_parallel_size": 4}
CP4: dict[str, Any] = {"context_parallel_size": 4}
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, TP2),
    "TP2 SP": (2, {**TP2, **SP}),
    "TP4": (4, TP4),
    "TP4 SP": (4, {**TP4, **SP}),
    "PP2": (2, PP2),
    "PP2 VPP2": (2, {**PP2, **VPP2}),
    "PP4": (4, PP4),
    "DP2": (2, {}),
    "DP4": (4, {}),
    "DP2 overlap": (2, OVERLAP),
    "DP2 distopt": (2, DISTRIBUTED_OPTIMIZER),
    "DP4 distopt overlap": (4, {**DISTRIBUTED_OPTIMIZER, **OVERLAP}),
    "TP2 PP2": (4, {**TP2, **PP2}),
    "TP2 PP2 SP": (4, {**TP2, **PP2, **SP}),
    "TP2 DP2 distopt": (4, {**TP2, **DISTRIBUTED_OPTIMIZER}),
    "PP2 DP2": (4, PP2),
    "PP2 VPP2 DP2 distopt overlap": (4, {**PP2, **VPP2, **DISTRIBUTED_OPTIMIZER, **OVERLAP}),
    "CP2": (2, CP2),
    "CP4": (4, CP4),
    "CP2 DP2 distopt": (4, {**CP2, **DISTRIBUTED_OPTIMIZER}),
    "TP2 CP2 SP": (4, {**TP2, **CP2, **SP}),
    "PP2 CP2": (4, {**PP2, **CP2}),
    "PP2 VPP2 CP2": (4, {**PP2, **VPP2, **CP2}),
}
MICROBATCHES: dict[str, dict[str, Any]] = {
    "mbs 1": {"micro_batch_size": 1},
    "mbs 2": {"micro_batch_size": 2},
    "mbs 4": {"micro_batch_size": 4},
    "packed 32": {"max_tokens_per_microbatch": 32},
    "packed 100": {"max_tokens_per_microbatch": 100},
}
_OBJECTIVES = ("all_pairs", "mpo", "softmax", "margin", "plackett_luce", "nca", "dpo", "lipo_lambda")


MIXTURE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2": (2, PP2),
    "EP2": (2, EP2),
    "EP2 DP4 distopt overlap": (4, {**EP2, **DISTRIBUTED_OPTIMIZER, **OVERLAP}),
    "TP2 EP2 SP": (4, {**TP2, **SP, **EP2}),
    "PP2 EP2": (4, {**PP2, **EP2}),
    "CP2 EP2 allgather": (2, {**CP2, **EP2, "moe_token_dispatcher_type": "allgather"}),
}


def _case(
    layout: str,
    microbatches: str,
    objective: str,
    precision: dict[str, Any] | None = None,
    model: str = "llama",
) -> LayoutCase:
    num_ranks, parallel = (MIXTURE_LAYOUTS if model == "mixture" else LAYOUTS)[layout]
    return LayoutCase(
        num_ranks=num_ranks,
        model=model,
        parallel=parallel,
        precision=precision or {},
        loss={"objective": objective},
        optimizer=ADAM if "distopt" in layout else SGD,
        num_steps=NUM_STEPS,
        num_groups=NUM_GROUPS,
        **MICROBATCHES[microbatches],
    )


def _cases() -> Iterator[tuple[str, LayoutCase]]:
    objectives = cycle(_OBJECTIVES)
    for layout in LAYOUTS:
        for microbatches in ("mbs 2", "packed 100"):
            objective = next(objectives)
            yield f"{layout}, {microbatches}, {objective}", _case(layout, microbatches, objective)
        next(objectives)  # so that a layout's two objectives are others next time round
    for layout in ("one rank", "PP2 VPP2", "DP4"):
        for microbatches in ("mbs 1", "mbs 4", "packed 32"):
            yield f"{layout}, {microbatches}, all_pairs", _case(layout, microbatches, "all_pairs")
    for name, precision in (("recompute full", FULL), ("recompute selective", SELECTIVE)):
        for layout, microbatches in (("TP2 PP2", "mbs 2"), ("PP2 CP2", "packed 100")):
            yield f"{layout}, {microbatches}, mpo, {name}", _case(layout, microbatches, "mpo", precision)
    for layout, microbatches in zip(MIXTURE_LAYOUTS, cycle(("mbs 2", "packed 100"))):
        yield f"mixture, {layout}, {microbatches}, mpo", _case(layout, microbatches, "mpo", model="mixture")


CASES: dict[str, LayoutCase] = dict(_cases())
FULL_PRODUCT: dict[str, LayoutCase] = {
    f"{layout}, {microbatches}, {objective}": _case(layout, microbatches, objective)
    for layout in LAYOUTS
    for microbatches in MICROBATCHES
    for objective in _OBJECTIVES
}


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How far a layout is from the one graph; 0 is equal. All relative."""

    loss: float
    """Largest of the steps' losses, each relative to itself."""
    score: float
    """Largest of a response, relative to the largest score; first step."""
    coefficient: float
    """dL/dlogp, likewise."""
    gradient: float
    """||difference|| / ||gradient|| over the model; first step."""
    gradient_entry: float
    """Largest of an entry, relative to the model's largest gradient entry."""
    grad_norm: float
    """Largest of the steps' norms, each relative to itself."""
    weights: float
    """||difference|| / ||distance moved|| over the model after three updates."""


TOLERANCE = Differences(
    loss=1e-5, score=1e-5, coefficient=1e-5, gradient=1e-5, gradient_entry=1e-5, grad_norm=1e-5, weights=1e-5
)


@dataclass(frozen=True)
class Expected:
    """What the one graph says."""

    scores: np.ndarray
    coefficients: np.ndarray
    gradient: dict[str, torch.Tensor]
    losses: list[float]
    grad_norms: list[float]
    moved: dict[str, torch.Tensor]


@cache
def expected(pool: RankPool, model: str, loss: str, optimizer: str) -> Expected:
    """``loss`` and ``optimizer`` are JSON, so that they can be keys."""
    options, updates = json.loads(loss), json.loads(optimizer)
    start = weights_of(pool, model)
    samples = make_samples(NUM_STEPS * NUM_GROUPS)
    reference = reference_logps(samples)
    leaves = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    graph = coupled_loss(leaves, MODELS[model], samples[:NUM_GROUPS], reference, options)
    slopes = torch.autograd.grad(graph.loss, [graph.logps[i] for i in graph.read], retain_graph=True)
    graph.loss.backward()
    batches = [samples[first : first + NUM_GROUPS] for first in range(0, len(samples), NUM_GROUPS)]
    end, losses, norms = trained(start, MODELS[model], batches, reference, options, optimizer=updates)
    return Expected(
        scores=np.array([float(graph.scores[i].detach()) for i in graph.read]),
        coefficients=np.array([float(slope) for slope in slopes]),
        gradient={n: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for n, leaf in leaves.items()},
        losses=losses,
        grad_norms=norms,
        moved={name: weight - start[name] for name, weight in end.items()},
    )


def measure(pool: RankPool, case: LayoutCase, run: Callable[[LayoutCase], RankResult] = run_case) -> Differences:
    """Run the case and compare."""
    results: list[RankResult] = pool.run(case.num_ranks, run, case, timeout=300)
    wanted = expected(pool, case.model, json.dumps(case.loss_options), json.dumps(dict(case.optimizer)))
    start = weights_of(pool, case.model)
    for name, weight in whole_tensors([r.weights_before for r in results]).items():
        assert torch.equal(weight, start[name]), f"{name}: the layout starts from other weights"
    assert min(wanted.grad_norms) > case.optimizer["clip_grad"], "clipping must act"
    gradient = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    weights = whole_tensors([r.weights_after for r in results])
    reporting = [r for r in results if r.losses]
    assert reporting, "no rank reports a loss"
    return Differences(
        loss=max(_relative([step["loss"] for step in r.losses], wanted.losses) for r in reporting),
        score=max(_to_largest(r.scores[0], wanted.scores) for r in reporting),
        coefficient=max(_to_largest(r.coefficients[0], wanted.coefficients) for r in reporting),
        gradient=relative_gap(gradient, wanted.gradient),
        gradient_entry=worst_entry(gradient, wanted.gradient)[0],
        grad_norm=max(_relative(r.grad_norms, wanted.grad_norms) for r in results),
        weights=relative_gap({name: weight - start[name] for name, weight in weights.items()}, wanted.moved),
    )


def _relative(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) == NUM_STEPS
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted))


def _to_largest(found_R: np.ndarray, wanted_R: np.ndarray) -> float:
    assert found_R.shape == wanted_R.shape
    return float(np.abs(found_R - wanted_R).max() / np.abs(wanted_R).max())


def main() -> int:
    """Print the table, write it down, and fail where a tolerance is broken."""
    from invariance_report import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
