"""Communication that overlaps computation changes no bit of what it should not: losses, gradients, weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from layout_case import LayoutCase
from matrix import ADAM, NUM_GROUPS, NUM_STEPS, OVERLAP, TOLERANCE, measure
from parity import DISTRIBUTED_OPTIMIZER, PP2, VPP2
from rank_pool import RankPool

# Buckets so small that each layer has several, and the output layer one that no module's forward asks for.
LATE: dict[str, Any] = {
    **DISTRIBUTED_OPTIMIZER,
    **OVERLAP,
    "overlap_param_gather": True,
    "ddp_bucket_size": 2000,
}


def on(num_ranks: int, parallel: dict[str, Any], **case: Any) -> LayoutCase:
    defaults: dict[str, Any] = {"optimizer": ADAM, "num_steps": NUM_STEPS, "num_groups": NUM_GROUPS}
    return LayoutCase(num_ranks=num_ranks, parallel=parallel, **(defaults | case))


CASES = {
    "reduced in small buckets": on(2, {**OVERLAP, "ddp_bucket_size": 2000}, loss={"objective": "mpo"}),
    "gathered late": on(2, LATE, model="llama-untied"),
    "gathered late, no scoring pass": on(2, LATE, loss={"objective": "nca"}, max_tokens_per_microbatch=100),
    "gathered late, interleaved": on(4, {**PP2, **VPP2, **LATE}),
}


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_the_one_graph(pool: RankPool, name: str):
    found, allowed = dataclasses.asdict(measure(pool, CASES[name])), dataclasses.asdict(TOLERANCE)
    assert {n: v for n, v in found.items() if not v <= allowed[n]} == {}


def test_digest_and_replicas_see_weights_that_were_gathered_late(pool: RankPool):
    on_time = {name: value for name, value in LATE.items() if name != "overlap_param_gather"}
    digests = [
        {part.digest_after for part in pool.run(2, _run_and_digest, on(2, parallel))} for parallel in (on_time, LATE)
    ]
    assert len(digests[0]) == 1
    assert digests[0] == digests[1]


def _run_and_digest(case: LayoutCase) -> Any:
    import layout_run

    # Without the test's own gather, the digest has to ask for the weights itself.
    kept, layout_run.finish_param_gather = layout_run.finish_param_gather, lambda chunks: None
    try:
        return layout_run.run_case(case)
    finally:
        layout_run.finish_param_gather = kept
