"""Batches from worker processes are the batches of the source, in any order of asking; a dead worker is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_groupdpo.data.batches.planner import PlanOptions
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.errors import UserError
from megatron_groupdpo.run.batches import BatchSource, PlannedBatch, Prefetcher
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.types import GroupSample

GROUPS = 7


def samples() -> list[GroupSample]:
    draw = np.random.default_rng(0)
    return [
        GroupSample(
            group_id=g,
            first_response_id=3 * g,
            prompt_tokens=draw.integers(0, 50, size=4, dtype=np.int32),
            response_tokens=tuple(draw.integers(0, 50, size=n, dtype=np.int32) for n in (2, 5, 3)),
            response_masks=(None, None, None),
            labels_K=np.array([1, -1, -1], dtype=np.int8),
            values_K=np.array([1.0, 0.5, 0.0], dtype=np.float32),
        )
        for g in range(GROUPS)
    ]


@pytest.fixture
def source() -> BatchSource:
    return make_source()


def make_source() -> BatchSource:
    loss = LossOptions(
        objective="all_pairs", beta=0.1, score_average=False, nll_coeff=1.0, nll_average="sum", one_sided_nll=False
    )
    return BatchSource(
        samples(),  # type: ignore[arg-type]
        range(GROUPS),
        loss=loss,
        plan=PlanOptions(max_tokens_per_microbatch=20, data_parallel_size=2),
        data_parallel_rank=1,
        seed=3,
        sampler=GroupSampler(GROUPS, seed=3),
        reference=np.linspace(-9.0, -1.0, 3 * GROUPS),  # type: ignore[arg-type]
    )


def same(one: PlannedBatch, other: PlannedBatch) -> bool:
    tensors = [
        (one.batch.labels_GK, other.batch.labels_GK),
        (one.batch.response_ids_R, other.batch.response_ids_R),
        (one.ref_logps_R, other.ref_logps_R),
        *((m.tokens_BS, n.tokens_BS) for m, n in zip(one.microbatches, other.microbatches, strict=True)),
        *((m.targets_T, n.targets_T) for m, n in zip(one.microbatches, other.microbatches, strict=True)),
    ]
    return one.group_ids == other.group_ids and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetched_batches_are_those_of_the_source(source: BatchSource, num_workers: int):
    with Prefetcher(source, num_workers=num_workers, num_groups=2, end=22) as batches:
        for place in (0, 2, 4, 6, 14, 16, 3, 5, 20, 24):  # in turn, ahead, back, and beyond the end
            assert same(batches.batch(place), source.batch(place, 2)), place


@pytest.mark.costly
def test_a_worker_that_dies_ends_the_run_with_its_reason(source: BatchSource):
    with Prefetcher(source, num_workers=1, num_groups=2, end=1000) as batches:
        batches.batch(0)
        assert batches._pool is not None
        for process in list(batches._pool._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"prepares batches died .* lower --num-workers"):
            take_many(batches)


def take_many(batches: Prefetcher) -> None:
    """Those that were ready are still good."""
    for place in range(2, 100, 2):
        batches.batch(place)
        time.sleep(0.02)


LEAVES = """
import os, sys
sys.path.insert(0, {folder!r})
from test_prefetch import make_source
from megatron_groupdpo.run.batches import Prefetcher

if __name__ == "__main__":
    batches = Prefetcher(make_source(), num_workers=2, num_groups=2, end=1000)
    batches.batch(0)
    print("one", flush=True)
    os._exit(1)
"""


@pytest.mark.costly
def test_workers_end_with_a_run_that_ends_in_any_way(tmp_path: Path):
    """They would hold its output open, and whoever reads that would wait for ever."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES.format(folder=str(Path(__file__).parent)))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (1, "one\n")
