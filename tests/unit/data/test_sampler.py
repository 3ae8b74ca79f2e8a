"""The order of groups: a permutation each epoch, and nothing but the seed and the count consumed decides it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_groupdpo.data.sampler import GroupSampler

sizes = st.integers(1, 30)
seeds = st.integers(0, 2**40)


@given(sizes, seeds, st.integers(0, 3), st.booleans())
def test_each_epoch_is_a_permutation(num_groups: int, seed: int, epoch: int, shuffle: bool):
    taken = GroupSampler(num_groups, seed=seed, shuffle=shuffle).take(epoch * num_groups, num_groups)
    assert sorted(group for group, _ in taken) == list(range(num_groups))
    assert {at for _, at in taken} == {epoch}


@given(sizes, seeds, st.lists(st.integers(1, 13), min_size=1, max_size=12))
def test_the_order_does_not_depend_on_the_batch_size(num_groups: int, seed: int, batch_sizes: list[int]):
    sampler = GroupSampler(num_groups, seed=seed)
    total = sum(batch_sizes)
    pieces, consumed = [], 0
    for size in batch_sizes:
        pieces += sampler.take(consumed, size)
        consumed += size
    assert pieces == GroupSampler(num_groups, seed=seed).take(0, total)


@given(sizes, seeds, st.integers(0, 100), st.integers(0, 100))
def test_the_consumed_count_is_the_only_state(num_groups: int, seed: int, first: int, second: int):
    used = GroupSampler(num_groups, seed=seed)
    used.take(first, 5)
    assert used.take(second, 7) == GroupSampler(num_groups, seed=seed).take(second, 7)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(group for group, _ in GroupSampler(20, seed=seed).take(epoch * 20, 20))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_without_shuffling_the_order_is_that_of_the_store():
    assert GroupSampler(3, seed=1, shuffle=False).take(2, 4) == [(2, 0), (0, 1), (1, 1), (2, 1)]
