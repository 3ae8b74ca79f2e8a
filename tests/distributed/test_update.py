"""What an update decays, and the digest of the weights. Updates on every layout: ``test_layout_invariance.py``."""

from __future__ import annotations

import pytest
from layout_case import MODELS, LayoutCase
from layout_run import run_case
from matrix import ADAM, LAYOUTS, MIXTURE_LAYOUTS, NUM_GROUPS, NUM_STEPS, TOLERANCE, measure
from rank_pool import RankPool


@pytest.mark.parametrize("layout", ["one rank", "TP2 PP2 SP", "CP2"])
def test_norms_and_biases_get_no_weight_decay(pool: RankPool, layout: str):
    """The model with biases; one_graph.py decays matrices alone."""
    num_ranks, parallel = LAYOUTS[layout]
    case = LayoutCase(
        num_ranks=num_ranks,
        parallel=parallel,
        model="gpt",
        optimizer=ADAM,
        num_steps=NUM_STEPS,
        num_groups=NUM_GROUPS,
    )
    assert measure(pool, case).weights <= TOLERANCE.weights


@pytest.mark.parametrize("model", MODELS)
def test_the_digest_of_the_weights_does_not_depend_on_the_layout(pool: RankPool, model: str):
    """Nor does it change without an update; one update of 1e-6 changes it."""
    digests = set()
    layouts = [LAYOUTS[name] for name in ("one rank", "TP2 PP2 SP", "PP2 VPP2 DP2 distopt overlap", "CP2")]
    if model == "mixture":
        layouts.append(MIXTURE_LAYOUTS["EP2 DP4 distopt overlap"])
    for num_ranks, parallel in layouts:
        case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model, num_groups=1)
        for result in pool.run(num_ranks, run_case, case):
            digests |= {result.digest_before, result.digest_after}
    assert len(digests) == 1
    case = LayoutCase(model=model, num_groups=1, optimizer={"optimizer": "sgd", "lr": 1e-6})
    (result,) = pool.run(1, run_case, case)
    assert {result.digest_before} == digests
    assert result.digest_after not in digests
