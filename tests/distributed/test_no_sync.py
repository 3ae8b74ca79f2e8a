"""Neither pass, nor what lies between them, makes the host wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
from layout_case import LayoutCase
from rank_pool import RankPool

PACKED = {"max_tokens_per_microbatch": 100}


def waits(case: LayoutCase, fault: str | None = None) -> list[str]:
    """What waits for the device between the start of the scoring pass and the end of the backward."""
    from layout_case import MODELS
    from layout_run import batch_source, set_weights
    from sync_watch import SyncWatch

    from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.step.train_step import accumulate_gradient

    parallel = ParallelConfig(device="cpu", **case.parallel)
    ranks = initialize(parallel, seed=1)
    try:
        precision = PrecisionConfig(log_probs_chunk_size=5, **case.precision)
        model = ModelConfig(**MODELS[case.model], scale_embeddings=True)
        policy = build_policy(model, parallel, precision, ranks, seed=1, training=True)
        set_weights(policy)
        source = batch_source(case, parallel, ranks)
        planned = source.batch(0, case.num_groups)
        weights = [p for chunk in policy.chunks for p in chunk.parameters()]
        # The first backward meets what Megatron sets up once.
        given = (policy.engine, planned.microbatches, planned.batch, planned.ref_logps_R, source.loss)
        accumulate_gradient(*given)
        with SyncWatch(weights) as watch:
            if fault is not None:
                inject(fault, policy)
            outcome = accumulate_gradient(*given)
            during = list(watch.found)
            if outcome is not None and outcome.drift is not None:
                assert outcome.score_drift == 0.0
                # The watch sees a wait where there is one: this read is one.
                assert len(watch.found) > len(during)
        return during
    finally:
        shut_down()


def inject(fault: str, policy: Any) -> None:
    engine = policy.engine
    score = engine.score

    def wait_after_scoring(*args: Any) -> Any:
        logps_R = score(*args)
        {"item": lambda: logps_R.sum().item(), "mask": lambda: logps_R[logps_R < 0], "host": lambda: logps_R.cpu()}[
            fault
        ]()
        return logps_R

    engine.score = wait_after_scoring


CASES = {
    "padded": LayoutCase(),
    "packed": LayoutCase(**PACKED),
    "values": LayoutCase(loss={"objective": "lipo_lambda", "score_average": True}),
    "pairs": LayoutCase(loss={"objective": "dpo"}, **PACKED),
    "no scoring pass": LayoutCase(loss={"objective": "nca"}),
    "recomputed": LayoutCase(
        precision={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_wait_for_the_device(pool: RankPool, name: str):
    (found,) = pool.run(1, waits, CASES[name])
    assert found == []


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}])
def test_a_step_of_several_ranks_does_not_wait_for_the_device(pool: RankPool, layout: dict[str, Any]):
    found = pool.run(2, waits, LayoutCase(num_ranks=2, parallel=layout, **PACKED))
    assert found == [[], []]


@pytest.mark.parametrize("fault", ["item", "mask", "host"])
def test_the_watch_sees_a_wait_between_the_passes(pool: RankPool, fault: str):
    (found,) = pool.run(1, waits, LayoutCase(), fault)
    assert len(found) >= 1
    assert all("engine" in line or "train_step" in line or "coefficients" in line for line in found)
