"""The order of groups: a permutation each epoch, and nothing but the seed and the count consumed decides it."""

from __future__ import annotations

import hashlib

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


def blend(sizes: list[int], weights: list[float], seed: int = 3, **which: int) -> BlendedSampler:
    return BlendedSampler([GroupSampler(n, seed=(seed, i)) for i, n in enumerate(sizes)], weights, **which)


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


OLD_BLENDS = ["ec717b3eb945ae23", "99b68a7538877ad5", "d51226843a1feb0a"]
OLD_START = [3, 2, 4, 5, 1, 3, 5, 0, 4, 3, 2, 5]
"""As written by the only blend there was."""


def worst_stretch(shares: np.ndarray, owners: np.ndarray) -> float:
    """Over all stretches, also across the end of a block, and all sources: groups too many or too few."""
    worst = 0.0
    for source, share in enumerate(shares):
        lag = np.concatenate([[0.0], np.cumsum(owners == source) - share * np.arange(1, len(owners) + 1) / len(owners)])
        assert abs(lag[-1]) < 1e-6, "a block has its shares exactly, so that lags go on from block to block"
        worst = max(worst, float(lag.max() - lag.min()))
    return worst


def owners_of(weights: list[float], **blend: int) -> tuple[np.ndarray, np.ndarray]:
    """[sources] shares and [block] sources, from the groups that are taken."""
    sources = [GroupSampler(3, seed=(3, i)) for i in range(len(weights))]
    sampler = BlendedSampler(sources, weights, **blend)
    return sampler.shares, np.array([group // 3 for group, _ in sampler.take(0, 10_000)])


@settings(deadline=None, max_examples=12)
@given(
    st.one_of(
        st.lists(st.floats(0.001, 100), min_size=1, max_size=120),
        st.tuples(st.floats(1, 200), st.integers(1, 150)).map(lambda one: [one[0], *[1.0] * one[1]]),
    )
)
def test_every_stretch_has_its_shares_for_any_number_of_stores(weights: list[float]):
    assert worst_stretch(*owners_of(weights)) < 2


def test_fifty_small_stores_do_not_land_in_a_run():
    weights = [50.0, *[1.0] * 50]
    assert worst_stretch(*owners_of(weights, blend=1)) > 24, "what the first blend did"
    assert worst_stretch(*owners_of(weights)) < 2


def test_the_first_blend_stays_for_runs_that_began_with_it():
    digests = [
        hashlib.sha256(owners_of(weights, blend=1)[1].astype("<i8").tobytes()).hexdigest()[:16]
        for weights in ([50.0, *[1.0] * 50], [1.0, 2.0], [0.3, 5.0, 1.0, 1.0])
    ]
    assert digests == OLD_BLENDS
    assert [group for group, _ in blend([3, 3], [1, 2], blend=1).take(0, 12)] == OLD_START


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
