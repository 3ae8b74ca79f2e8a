"""The harness itself: results in order, remote tracebacks, no hang, and nothing left of a job's process groups."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import troubles
from layout_case import LayoutCase
from parity import CP2, DISTRIBUTED_OPTIMIZER, EP2, PP2, SP, TP2
from rank_pool import RankPool, RanksFailed


@pytest.fixture
def own_pool() -> Iterator[RankPool]:
    ranks = RankPool(2)
    yield ranks
    ranks.close()


def sum_of_ranks() -> int:
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def test_ranks_of_any_number_find_each_other(pool: RankPool):
    assert pool.run(4, sum_of_ranks) == [6] * 4
    assert pool.run(2, sum_of_ranks) == [1] * 2
    assert pool.run(4, troubles.environment, "RANK") == ["0", "1", "2", "3"]


def test_a_failure_ends_all_ranks_with_the_remote_traceback_and_the_next_job_runs(own_pool: RankPool):
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="ArithmeticError: seen on rank 1 alone") as failure:
        own_pool.run(2, troubles.fail_on_rank_1_while_others_wait)
    assert "troubles.py" in str(failure.value), "the line that raised"
    with pytest.raises(RanksFailed, match="exit code 7"):
        own_pool.run(2, troubles.die_on_rank_0)
    with pytest.raises(RanksFailed, match="still running"):
        own_pool.run(1, troubles.sleep, timeout=1)
    assert time.monotonic() - started < 60
    assert own_pool.run(2, troubles.environment, "WORLD_SIZE") == ["2", "2"]


def test_a_rank_that_dies_between_two_jobs_fails_the_next_job_alone(own_pool: RankPool):
    own_pool.run(2, troubles.environment, "RANK")
    own_pool._processes[0].kill()
    own_pool._processes[0].join()
    with pytest.raises(RanksFailed, match=r"died since the last job: rank 0 \(exit code -9\)"):
        own_pool.run(2, troubles.environment, "RANK")
    assert own_pool.run(2, troubles.environment, "RANK") == ["0", "1"]


MANY_CASES = [
    LayoutCase(model="mixture", parallel=parallel, num_groups=1)
    for parallel in (TP2 | SP, CP2, EP2, PP2, DISTRIBUTED_OPTIMIZER)
] * 10


def both_passes(case: LayoutCase) -> None:
    from layout_case import MODELS
    from layout_run import batch_source

    from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.step.train_step import accumulate_gradient

    parallel = ParallelConfig(device="cpu", **case.parallel)
    ranks = initialize(parallel, seed=1)
    model = ModelConfig(**(MODELS[case.model] | {"num_layers": 2, "moe_layer_freq": (1, 1)}))
    policy = build_policy(model, parallel, PrecisionConfig(), ranks, seed=1, training=True)
    source = batch_source(case, parallel, ranks)
    planned = source.batch(0, case.num_groups)
    accumulate_gradient(policy.engine, planned.microbatches, planned.batch, planned.ref_logps_R, source.loss)
    shut_down()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.costly
def test_fifty_layouts_leave_no_thread_behind(pool: RankPool):
    """A group has threads, each of which wakes a hundred times a second, until nothing refers to it."""
    pool.run(2, both_passes, MANY_CASES[0])
    before = pool.run(2, num_threads)
    for case in MANY_CASES:
        pool.run(2, both_passes, case)
    assert pool.run(2, num_threads) == before


def keep_a_group() -> None:
    dist.init_process_group("gloo")


def test_a_job_that_keeps_a_group_fails(pool: RankPool):
    with pytest.raises(RanksFailed, match=r"keep_a_group left \d+ threads of process groups"):
        pool.run(1, keep_a_group)
