"""Which groups each step trains on: a seeded order that depends on the seed and the stores alone.

The only state is how many groups were consumed, so a run resumes under any layout.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from megatron_groupdpo.data.store.reader import GroupDataset
from megatron_groupdpo.errors import DataError

_BLEND_BLOCK = 10_000
"""A blend repeats after so many groups; weights are rounded to shares of it."""
BLENDS = (1, 2)
"""Ways to interleave the sources of a blend. A checkpoint names its own, and a resumed run goes on with it."""


class Sampler(Protocol):
    """An endless order over groups 0, 1, ... of a run's data."""

    def take(self, consumed_groups: int, count: int) -> list[tuple[int, int]]:
        """(group, epoch) of the ``count`` groups that follow the first ``consumed_groups``."""
        ...


class GroupSampler:
    """Global order over ``num_groups`` groups, one seeded permutation per epoch.

    Args:
        num_groups: how many.
        seed: a source's own.
        shuffle: otherwise the order of the store.
        sizes_G: [G] responses per group. Given, the first epoch goes from the smallest groups to the largest (a
            curriculum), those of one size in seeded order; the later ones are permutations.
    """

    def __init__(
        self, num_groups: int, *, seed: int | Sequence[int], shuffle: bool = True, sizes_G: np.ndarray | None = None
    ) -> None:
        assert num_groups > 0, "an empty store is refused when it is opened"
        self.num_groups = num_groups
        self.seed = [seed] if isinstance(seed, int) else list(seed)
        self.shuffle = shuffle
        self.sizes_G = sizes_G
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, consumed_groups: int, count: int) -> list[tuple[int, int]]:
        """See :class:`Sampler`."""
        return [self.at(position) for position in range(consumed_groups, consumed_groups + count)]

    def at(self, position: int) -> tuple[int, int]:
        """(group, epoch) at a place in the order."""
        epoch, index = divmod(position, self.num_groups)
        return int(self._order_of(epoch)[index]), epoch

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.arange(self.num_groups)
            if self.shuffle:
                self._order = np.random.Generator(np.random.PCG64([*self.seed, epoch])).permutation(self.num_groups)
            if self.sizes_G is not None and epoch == 0:
                self._order = self._order[np.argsort(self.sizes_G[self._order], kind="stable")]
        return self._order


class BlendedSampler:
    """Several sources by weight, each in its own order and with its own epochs.

    Sources are spread evenly: in any stretch of the order each has its share to within two groups, however many there
    are. Shares are the weights rounded to a ten-thousandth, at least one.

    Args:
        sources: one sampler each; groups are numbered from source to source.
        weights: positive, in any unit.
        blend: of :data:`BLENDS`. 1, as checkpoints without a number have it, keeps the shares for few sources only.
    """

    def __init__(self, sources: Sequence[GroupSampler], weights: Sequence[float], *, blend: int = BLENDS[-1]) -> None:
        assert len(sources) == len(weights) > 0
        assert blend in BLENDS
        self.sources = tuple(sources)
        self._first = np.cumsum([0, *(source.num_groups for source in sources)])
        self.shares = block_shares(weights, _BLEND_BLOCK)
        """[sources] int64: groups of each in a block."""
        self._owners = _by_middles(self.shares) if blend == 1 else _by_deadlines(self.shares)
        self._within = np.empty_like(self._owners)
        for source, share in enumerate(self.shares):
            self._within[self._owners == source] = np.arange(share)

    def take(self, consumed_groups: int, count: int) -> list[tuple[int, int]]:
        """See :class:`Sampler`."""
        return [self._at(position) for position in range(consumed_groups, consumed_groups + count)]

    def _at(self, position: int) -> tuple[int, int]:
        block, offset = divmod(position, len(self._owners))
        source = int(self._owners[offset])
        group, epoch = self.sources[source].at(block * int(self.shares[source]) + int(self._within[offset]))
        return int(self._first[source]) + group, epoch


def _by_middles(shares: np.ndarray) -> np.ndarray:
    """[block] int64, the source of each place: the k-th of n groups of a source belongs at (k + 1/2) / n.

    Sources with equal shares want the same places, and come there one after the other.
    """
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in shares])
    return np.repeat(np.arange(len(shares)), shares)[np.argsort(places, kind="stable")]


def _by_deadlines(shares: np.ndarray) -> np.ndarray:
    """[block] int64, the source of each place: after t places a source with n of the block's N groups has had more than
    n t / N - 1 of them and fewer than n t / N + 1.

    That gives its k-th group (from 0) a first place, k N / n rounded down, and a last one, (k + 1) N / n rounded up
    less 1. Of those whose first place has come, the one with the earliest last place is due; if any order keeps all,
    this does, and one exists (proportionate fairness: Baruah, Cohen, Plaxton and Varvel, 1996).
    """
    block = int(shares.sum())
    waiting = [(0, source, 0) for source in range(len(shares))]  # (first place, source, k): a heap
    due: list[tuple[int, int, int]] = []  # (last place, source, k): a heap
    owners = np.empty(block, dtype=np.int64)
    sizes = [int(share) for share in shares]
    for place in range(block):
        while waiting and waiting[0][0] <= place:
            _, source, k = heapq.heappop(waiting)
            heapq.heappush(due, (-(-(k + 1) * block // sizes[source]) - 1, source, k))
        last, source, k = heapq.heappop(due)
        assert last >= place
        owners[place] = source
        if k + 1 < sizes[source]:
            heapq.heappush(waiting, ((k + 1) * block // sizes[source], source, k + 1))
    return owners


def block_shares(weights: Sequence[float], block: int) -> np.ndarray:
    """[sources] int64 that sum to ``block`` (largest remainders), each at least 1."""
    exact = np.asarray(weights, dtype=np.float64)
    exact = exact / exact.max()  # so that no sum overflows
    exact = exact / exact.sum() * block
    shares = np.maximum(1, np.floor(exact).astype(np.int64))
    for source in np.argsort(-(exact - np.floor(exact)), kind="stable")[: max(0, block - int(shares.sum()))]:
        shares[source] += 1
    shares[shares.argmax()] += block - int(shares.sum())  # what the smallest ones were given
    return shares


Curriculum = Literal["none", "group-size"]


def build_sampler(
    dataset: GroupDataset,
    group_ids: np.ndarray,
    *,
    seed: int,
    shuffle: bool,
    weights: Sequence[float] = (),
    curriculum: Curriculum = "none",
    blend: int = BLENDS[-1],
) -> Sampler:
    """The order over ``group_ids``, which the sampler numbers 0, 1, ...

    Args:
        dataset: token stores.
        group_ids: [G] int64 rising group ids of the dataset.
        seed: of the order.
        shuffle: otherwise the order of the stores.
        weights: one for each store; none: all groups count alike.
        curriculum: ``group-size`` shows small groups first, in the first epoch.
        blend: how stores with weights are interleaved; see :class:`BlendedSampler`.

    Raises:
        DataError: a store with a weight has no group among ``group_ids``.
    """
    sizes_G = group_sizes(dataset, group_ids) if curriculum == "group-size" else None
    if not weights:
        return GroupSampler(len(group_ids), seed=seed, shuffle=shuffle, sizes_G=sizes_G)
    ends = np.searchsorted(group_ids, np.cumsum([len(store) for store in dataset.stores]))
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]
    sources = []
    for index, (store, part) in enumerate(zip(dataset.stores, parts)):
        if part.start == part.stop:
            raise DataError(f"{store.path}: has a weight and no group to train on; drop it, or lower valid_fraction")
        sources.append(
            GroupSampler(
                part.stop - part.start,
                seed=(seed, index),
                shuffle=shuffle,
                sizes_G=None if sizes_G is None else sizes_G[part],
            )
        )
    return BlendedSampler(sources, weights, blend=blend)


def group_sizes(dataset: GroupDataset, group_ids: np.ndarray) -> np.ndarray:
    """[G] int32 responses of each group."""
    sizes = np.concatenate([np.diff(store.first_response_G1).astype(np.int32) for store in dataset.stores])
    return sizes[group_ids]
