"""Which groups a run trains on and in which order, and which it holds out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from one_rank import SEQ_LENGTH, OneRank

from megatron_groupdpo.errors import DataError
from megatron_groupdpo.run.batches import Prefetcher
from megatron_groupdpo.run.parts import Run


def order(run: Run, count: int) -> list[int]:
    return run.train.batch(0, count).group_ids


@pytest.mark.acts("DataConfig.data_path", "DataConfig.shuffle")
def test_all_groups_of_all_stores_in_the_order_asked_for(one: OneRank):
    both = (str(one.large), str(one.small))
    assert order(one.build(data_path=both, shuffle=False), 16) == [*range(14), 0, 1]
    assert order(one.build(data_path=both[::-1], shuffle=False), 16) == [*range(14), 0, 1]
    stored = one.build(data_path=both[::-1]).train.dataset
    assert [len(store) for store in stored.stores] == [5, 9]
    shuffled = order(one.build(data_path=both), 28)
    assert shuffled[:14] != shuffled[14:]
    assert sorted(shuffled[:14]) == sorted(shuffled[14:]) == [*range(14)]
    assert shuffled[:14] != [*range(14)]


@pytest.mark.acts("DataConfig.data_weights")
@pytest.mark.parametrize(("weights", "shares"), [((3.0, 1.0), (12, 4)), ((0.5, 1.5), (4, 12)), ((1.0, 1.0), (8, 8))])
def test_a_store_has_the_share_of_its_weight(one: OneRank, weights: tuple[float, float], shares: tuple[int, int]):
    run = one.build(data_path=(str(one.large), str(one.small)), data_weights=weights)
    taken = Counter(group_id < 9 for group_id in order(run, 16))
    assert (taken[True], taken[False]) == shares


@pytest.mark.acts("DataConfig.curriculum")
def test_a_curriculum_goes_from_small_groups_to_large_ones(one: OneRank):
    run = one.build(data_path=(str(one.large), str(one.small)), curriculum="group-size")
    sizes = [len(run.train.dataset[group_id].labels_K) for group_id in order(run, 28)]
    assert sizes[:14] == sorted(sizes[:14])
    assert sizes[14:] != sorted(sizes[14:])
    assert sorted(sizes[:14]) == sorted(
        [2 + (row * 3) % 4 for row in range(9)] + [2 + (row * 3) % 4 for row in range(5)]
    )


@pytest.mark.acts("DataConfig.seq_length")
def test_a_response_may_be_as_long_as_the_sequence(one: OneRank):
    longest = one.build(seq_length=SEQ_LENGTH).train.dataset.longest_row
    one.build(seq_length=longest)
    with pytest.raises(DataError, match=f"have {longest} tokens, seq_length is {longest - 1}"):
        one.build(seq_length=longest - 1)


@pytest.mark.acts("DataConfig.valid_fraction")
@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_a_share_of_the_prompts_is_held_out(one: OneRank, fraction: float):
    """Those whose CRC-32, as a share of 2^32, lies below it."""
    run = one.build(data_path=(str(one.large), str(one.small)), valid_fraction=fraction, eval_interval=1)
    keys = np.concatenate([store.prompt_keys_G for store in run.train.dataset.stores])
    held_out = np.flatnonzero(keys < fraction * 2**32)
    assert run.valid is not None
    assert 0 < len(held_out) < 14
    assert run.valid.group_ids.tolist() == held_out.tolist()
    assert sorted([*run.train.group_ids, *held_out]) == [*range(14)]


@pytest.mark.acts("DataConfig.num_workers")
def test_so_many_processes_prepare_batches(one: OneRank):
    """That their batches are the run's own, and that they end with it, is in ``test_prefetch.py``."""
    for workers in (0, 3):
        run = one.build(num_workers=workers)
        with Prefetcher(run.train, num_workers=run.config.data.num_workers, num_groups=2, end=8) as batches:
            assert (batches._pool._max_workers if batches._pool else 0) == workers  # type: ignore[attr-defined]
