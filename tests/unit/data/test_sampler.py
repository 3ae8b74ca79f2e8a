"""The order of groups: a permutation each epoch, and nothing but the seed and the count consumed decides it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data.batches.sampler import BlendedSampler, GroupSampler, block_shares

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


def test_a_curriculum_shows_small_groups_first_and_shuffles_later_epochs():
    sizes_G = np.array([8, 2, 4, 2, 8, 2, 4, 16])
    taken = GroupSampler(8, seed=5, sizes_G=sizes_G).take(0, 24)
    epochs = [[group for group, at in taken if at == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(8)) for order in epochs)
    assert [int(sizes_G[group]) for group in epochs[0]] == [2, 2, 2, 4, 4, 8, 8, 16]
    assert sorted(epochs[1], key=lambda group: sizes_G[group]) != epochs[1]
    orders_of_equals = {tuple(GroupSampler(8, seed=s, sizes_G=sizes_G).take(0, 3)) for s in range(20)}
    assert len(orders_of_equals) > 3, "groups of one size come in seeded order"


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(weights, st.integers(1, 20_000))
def test_shares_of_a_block_sum_to_it_and_leave_nobody_out(weights: list[float], block: int):
    block = max(block, 5 * len(weights))
    shares = block_shares(weights, block)
    assert shares.sum() == block
    assert (shares >= 1).all()
    exact = np.array(weights) / sum(weights) * block
    if (exact >= 1).all():
        assert np.abs(shares - exact).max() <= 1


def blend(sizes: list[int], weights: list[float], seed: int = 3) -> BlendedSampler:
    return BlendedSampler([GroupSampler(n, seed=(seed, i)) for i, n in enumerate(sizes)], weights)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(0, 30_000),
    st.integers(1, 300),
)
def test_every_stretch_of_a_blend_has_its_shares(sources: list[tuple[int, float]], start: int, count: int):
    sizes, weights = [n for n, _ in sources], [w for _, w in sources]
    first = np.cumsum([0, *sizes])
    owners = [
        int(np.searchsorted(first, group, side="right")) - 1 for group, _ in blend(sizes, weights).take(start, count)
    ]
    for source, weight in enumerate(weights):
        assert abs(owners.count(source) - count * weight / sum(weights)) <= 2 + count / 10_000


@settings(deadline=None)
@given(st.integers(0, 25_000), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_the_consumed_count_is_the_only_state_of_a_blend(consumed: int, batches: list[int]):
    whole = blend([7, 30], [1, 2]).take(consumed, sum(batches))
    pieces, used = [], blend([7, 30], [1, 2])
    for size in batches:
        pieces += used.take(consumed, size)
        consumed += size
    assert pieces == whole


def test_each_source_of_a_blend_goes_through_all_its_groups_before_any_again():
    taken = blend([5, 100], [1, 1]).take(0, 400)
    first = [(group, epoch) for group, epoch in taken if group < 5]
    assert len(first) == 200
    for epoch in range(40):
        assert sorted(group for group, at in first if at == epoch) == list(range(5))
    second = [group for group, at in taken if group >= 5 and at == 0]
    assert sorted(second) == list(range(5, 105))


def test_huge_weights_do_not_overflow():
    assert block_shares([1e308, 1e308], 10).tolist() == [5, 5]
