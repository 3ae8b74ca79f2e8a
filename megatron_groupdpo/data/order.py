"""The order of a dataset's groups in training: shuffled, blended by weight, small groups first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_groupdpo.data.dataset import GroupDataset
from megatron_groupdpo.data.sampler import BlendedSampler, GroupSampler, Sampler
from megatron_groupdpo.errors import DataError

Curriculum = Literal["none", "group-size"]


def build_sampler(
    dataset: GroupDataset,
    group_ids: np.ndarray,
    *,
    seed: int,
    shuffle: bool,
    weights: Sequence[float] = (),
    curriculum: Curriculum = "none",
) -> Sampler:
    """The order over ``group_ids``, which the sampler numbers 0, 1, ...

    Args:
        dataset: token stores.
        group_ids: [G] int64 rising group ids of the dataset.
        seed: of the order.
        shuffle: otherwise the order of the stores.
        weights: one for each store; none: all groups count alike.
        curriculum: ``group-size`` shows small groups first, in the first epoch.

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
    return BlendedSampler(sources, weights)


def group_sizes(dataset: GroupDataset, group_ids: np.ndarray) -> np.ndarray:
    """[G] int32 responses of each group."""
    sizes = np.concatenate([np.diff(store.first_response_G1).astype(np.int32) for store in dataset.stores])
    return sizes[group_ids]
