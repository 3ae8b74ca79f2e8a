"""Several token stores as one numbered sequence of groups, and its split by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_groupdpo.data.store import TokenStore
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupSample

_BLOCK_GROUPS = 1 << 20  # groups looked at at once


class GroupDataset:
    """Token stores one after the other; group and response ids run on from store to store."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores = tuple(stores)
        self.first_group = np.cumsum([0, *(len(store) for store in self.stores)])
        self.first_response = np.cumsum([0, *(store.num_responses for store in self.stores)])

    @classmethod
    def open(cls, paths: Sequence[str]) -> GroupDataset:
        """Open the stores and check that they go together.

        Raises:
            DataError: a store is absent, broken or empty, or made with another tokenizer than the first.
        """
        stores = [TokenStore.open(Path(path)) for path in paths]
        for path, store in zip(paths, stores):
            if not len(store):
                raise DataError(f"{path}: the store has no groups; see the summary of tools/preprocess_data.py")
            ours, first = store.meta["tokenizer"]["digest"], stores[0].meta["tokenizer"]["digest"]
            if ours != first:
                raise DataError(
                    f"{path}: tokenizer digest {ours[:16]} differs from {first[:16]} of {paths[0]}; "
                    "one run reads stores of one tokenizer"
                )
        return cls(stores)

    def __len__(self) -> int:
        return int(self.first_group[-1])

    @property
    def num_responses(self) -> int:
        """Over all stores."""
        return int(self.first_response[-1])

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer all stores share."""
        return int(self.stores[0].meta["tokenizer"]["vocab_size"])

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt + response."""
        return max(int(store.meta["max_row_tokens"]) for store in self.stores)

    def __getitem__(self, group_id: int) -> GroupSample:
        index, local = self._place(group_id)
        sample = self.stores[index][local]
        return replace(
            sample, group_id=group_id, first_response_id=sample.first_response_id + int(self.first_response[index])
        )

    def where(self, group_id: int) -> str:
        """``file:line`` of the record a group came from."""
        index, local = self._place(group_id)
        return self.stores[index].where(local)

    def _place(self, group_id: int) -> tuple[int, int]:
        index = int(np.searchsorted(self.first_group, group_id, side="right")) - 1
        return index, group_id - int(self.first_group[index])


def split_by_prompt(dataset: GroupDataset, valid_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Group ids for training and for validation; groups with equal prompts fall on one side.

    int32 where they fit, else int64: the largest thing in memory that grows with the stores, 4 bytes a group.

    Raises:
        DataError: a side is left empty.
    """
    dtype = np.int32 if len(dataset) <= np.iinfo(np.int32).max else np.int64
    if valid_fraction == 0:
        everything = np.arange(len(dataset), dtype=dtype)
        return everything, everything[:0]
    train, held_out = [], []
    for index, store in enumerate(dataset.stores):
        for start in range(0, len(store), _BLOCK_GROUPS):
            is_held_out = store.prompt_keys_G[start : start + _BLOCK_GROUPS] < valid_fraction * 2**32
            first = dataset.first_group[index] + start
            held_out.append((np.flatnonzero(is_held_out) + first).astype(dtype))
            train.append((np.flatnonzero(~is_held_out) + first).astype(dtype))
    train_ids, held_out_ids = np.concatenate(train), np.concatenate(held_out)
    if not len(train_ids) or not len(held_out_ids):
        raise DataError(
            f"valid_fraction {valid_fraction} of {len(dataset)} groups leaves "
            f"{len(train_ids)} for training and {len(held_out_ids)} for validation; choose another fraction"
        )
    return train_ids, held_out_ids
