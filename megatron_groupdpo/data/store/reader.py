"""The token store: groups as token ids on disk, memory-mapped.

A store is a folder. ``tokens.bin/.idx`` is a Megatron indexed dataset with one document per group: sequence 0 is
the prompt, sequences 1..K are the responses. Beside it lie flat arrays over groups (G) and responses (R):

    first_response [G+1] int64   response k of group g is row ``first_response[g] + k`` of the response arrays
    labels [R] int8              values [R] float32        response_lengths [R] int32
    prompt_lengths [G] int32     source_ids [G] int32      source_rows [G] int64 (line or row in the source)
    ref_logps [R] float64        only where the records carry them; NaN where a text was truncated
    prompt_keys [G] uint32       CRC-32 of the prompt's ids, by which a validation set is split off
    mask_rows [R] int64          only where some response is masked: its row in ``masks.bin/.idx``, or -1

``writer.py`` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupdpo.data.store import format as fmt
from megatron_groupdpo.data.store.indexed import IndexedReader
from megatron_groupdpo.data.text.identity import describe, differences
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupSample


class TokenStore:
    """A store opened for reading. Items are :class:`~megatron_groupdpo.types.GroupSample`; safe to pickle."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        """The contents of ``meta.json``."""
        self._tokens = IndexedReader(path / fmt.TOKENS)
        self.first_response_G1 = self._array(fmt.FIRST_RESPONSE)
        """[G+1] int64."""
        self.labels_R = self._array(fmt.LABELS)
        """[R] int8."""
        self.values_R = self._array(fmt.VALUES)
        """[R] float32, NaN where absent."""
        self.prompt_lengths_G = self._array(fmt.PROMPT_LENGTHS)
        """[G] int32."""
        self.response_lengths_R = self._array(fmt.RESPONSE_LENGTHS)
        """[R] int32."""
        self.source_ids_G = self._array(fmt.SOURCE_IDS)
        """[G] int32."""
        self.source_rows_G = self._array(fmt.SOURCE_ROWS)
        """[G] int64."""
        self.prompt_keys_G = self._array(fmt.PROMPT_KEYS)
        """[G] uint32."""
        self.ref_logps_R = self._array(fmt.REF_LOGPS) if fmt.REF_LOGPS in meta["files"] else None
        """[R] float64, or None where the records carry none."""
        self._mask_rows_R = self._array(fmt.MASK_ROWS) if fmt.MASK_ROWS in meta["files"] else None
        self._masks = IndexedReader(path / fmt.MASKS) if self._mask_rows_R is not None else None

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open and check a store: sizes and sampled digests, in time that does not grow with it.

        Raises:
            DataError: absent, of another version, cut short, or changed.
        """
        folder = Path(path)
        meta = fmt.read_meta(folder)
        fmt.check_files(folder, meta, full=False)
        return cls(folder, meta)

    def verify(self) -> None:
        """Compare the full digest of every file; reads the whole store. DataError on a mismatch."""
        fmt.check_files(self.path, self.meta, full=True)

    def __len__(self) -> int:
        return self.meta["num_groups"]

    def __iter__(self) -> Iterator[GroupSample]:
        return (self[group_id] for group_id in range(len(self)))

    def __getitem__(self, group_id: int) -> GroupSample:
        if not 0 <= group_id < len(self):
            raise IndexError(f"group {group_id} of a store of {len(self)} groups")
        first, stop = (int(row) for row in self.first_response_G1[group_id : group_id + 2])
        # one prompt sequence precedes each group's responses
        prompt, *responses = self._tokens.read(first + group_id, stop + group_id + 1)
        return GroupSample(
            group_id=group_id,
            first_response_id=first,
            prompt_tokens=prompt.astype(np.int32),
            response_tokens=tuple(tokens.astype(np.int32) for tokens in responses),
            response_masks=tuple(self._mask(row) for row in range(first, stop)),
            labels_K=np.array(self.labels_R[first:stop]),
            values_K=np.array(self.values_R[first:stop]),
        )

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        # a pickled memory map would carry its contents along
        return TokenStore.open, (str(self.path),)

    @property
    def num_responses(self) -> int:
        """R, the rows of the flat response arrays."""
        return self.meta["num_responses"]

    @property
    def digest(self) -> str:
        """SHA-256 over tokens, masks, labels, values, tokenizer and options."""
        return self.meta["digest"]

    def load_tokenizer(self, options: TokenizerOptions | None = None) -> Tokenizer:
        """The tokenizer the store was made with, from where it was then or from where ``options`` says.

        Raises:
            DataError: it is not there, or it is another tokenizer.
        """
        made_with = self.meta["tokenizer"]
        if options is None:
            options = TokenizerOptions(**{key: made_with[key] for key in ("kind", "model", "chat_template")})
        tokenizer = load_tokenizer(options)
        if differ := differences(describe(tokenizer, options), made_with, with_template=True):
            raise DataError(
                f"{self.path}: the store was made with the tokenizer {made_with['model']} (digest "
                f"{made_with['digest'][:16]}), which {options.model} is not ({'; '.join(differ)}); give the store's "
                "own tokenizer, or run tools/preprocess_data.py with this one"
            )
        return tokenizer

    def where(self, group_id: int) -> str:
        """``file:line`` of the record the group came from."""
        source = self.meta["sources"][int(self.source_ids_G[group_id])]["path"]
        return f"{source}:{int(self.source_rows_G[group_id])}"

    def _mask(self, row: int) -> np.ndarray | None:
        if self._mask_rows_R is None or self._masks is None or self._mask_rows_R[row] < 0:
            return None
        mask_row = int(self._mask_rows_R[row])
        return self._masks.read(mask_row, mask_row + 1)[0].astype(bool)

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.path / name, mmap_mode="r", allow_pickle=False)


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
            ours, first = store.meta["tokenizer"], stores[0].meta["tokenizer"]
            if differ := differences(ours, first, with_template=True):
                raise DataError(
                    f"{path}: made with another tokenizer, {ours['model']}, than {paths[0]}, {first['model']} "
                    f"({'; '.join(differ)}); one run reads stores of one tokenizer"
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
