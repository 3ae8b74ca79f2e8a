"""The harness itself: results in order, remote tracebacks, and no hang."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import troubles
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
