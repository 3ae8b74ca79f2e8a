"""The token store: groups as token ids on disk, memory-mapped.

A store is a folder. ``tokens.bin/.idx`` is a Megatron indexed dataset with one document per group: sequence 0 is
the prompt, sequences 1..K are the responses. Beside it lie flat arrays over groups (G) and responses (R):

    first_response [G+1] int64   response k of group g is row ``first_response[g] + k`` of the response arrays
    labels [R] int8              values [R] float32        response_lengths [R] int32
    prompt_lengths [G] int32     source_ids [G] int32      source_rows [G] int64 (line or row in the source)
    ref_logps [R] float64        only where the records carry them; NaN where a text was truncated
    mask_rows [R] int64          only where some response is masked: its row in ``masks.bin/.idx``, or -1
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupdpo.data import store_format as fmt
from megatron_groupdpo.data.prepare import PreparedGroup
from megatron_groupdpo.data.tokenizer import Tokenizer, TokenizerOptions, load_tokenizer
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.mcore.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_groupdpo.types import GroupSample


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """What a store was made with."""

    tokenizer: Mapping[str, Any]
    """``digest``, ``vocab_size``, ``bos_id``, ``eos_id``, ``pad_id``, ``kind``, ``model``, ``chat_template``."""
    options: Mapping[str, Any]
    """Everything else that decides the contents, as plain JSON."""


class StoreWriter:
    """Writes the files of a store into an existing empty folder; see ``store_format.whole_folder``."""

    def __init__(self, folder: Path, identity: StoreIdentity) -> None:
        self._folder, self._identity = folder, identity
        self._tokens = IndexedWriter(folder / fmt.TOKENS, token_dtype(identity.tokenizer["vocab_size"]))
        self._masks: IndexedWriter | None = None
        self._num_masks = 0
        self._first_response = array("q", [0])
        self._labels, self._values = array("b"), array("f")
        self._prompt_lengths, self._response_lengths = array("i"), array("i")
        self._source_ids, self._source_rows = array("i"), array("q")
        self._mask_rows, self._ref_logps = array("q"), array("d")

    def add(self, group: PreparedGroup, source_id: int) -> None:
        """Append one group of source ``source_id``."""
        num_responses = len(group.response_tokens)
        assert num_responses >= 1
        assert len(group.prompt_tokens) >= 1
        assert len(group.labels) == len(group.values) == len(group.ref_logps) == num_responses
        self._tokens.add_document([group.prompt_tokens, *group.response_tokens])
        self._first_response.append(self._first_response[-1] + num_responses)
        self._labels.extend(group.labels)
        self._values.extend(group.values)
        self._ref_logps.extend(group.ref_logps)
        self._prompt_lengths.append(len(group.prompt_tokens))
        self._response_lengths.extend(len(tokens) for tokens in group.response_tokens)
        self._source_ids.append(source_id)
        self._source_rows.append(group.source_row)
        self._mask_rows.extend(self._add_mask(mask) for mask in group.response_masks)

    def finish(self, *, sources: Sequence[Mapping[str, Any]], counts: Any) -> str:
        """Write the arrays and ``meta.json``; returns the store's digest."""
        self._tokens.finalize()
        arrays: dict[str, tuple[array, type]] = {
            fmt.FIRST_RESPONSE: (self._first_response, np.int64),
            fmt.LABELS: (self._labels, np.int8),
            fmt.VALUES: (self._values, np.float32),
            fmt.PROMPT_LENGTHS: (self._prompt_lengths, np.int32),
            fmt.RESPONSE_LENGTHS: (self._response_lengths, np.int32),
            fmt.SOURCE_IDS: (self._source_ids, np.int32),
            fmt.SOURCE_ROWS: (self._source_rows, np.int64),
        }
        if self._masks is not None:
            self._masks.finalize()
            arrays[fmt.MASK_ROWS] = (self._mask_rows, np.int64)
        if not np.isnan(np.frombuffer(self._ref_logps)).all():
            arrays[fmt.REF_LOGPS] = (self._ref_logps, np.float64)
        for name, (values, dtype) in arrays.items():
            np.save(self._folder / name, np.frombuffer(values, dtype=dtype))
        meta: dict[str, Any] = {
            "format": fmt.FORMAT,
            "version": fmt.VERSION,
            "num_groups": len(self._prompt_lengths),
            "num_responses": len(self._labels),
            "num_tokens": sum(self._prompt_lengths) + sum(self._response_lengths),
            "max_row_tokens": self._max_row_tokens(),
            "tokenizer": dict(self._identity.tokenizer),
            "options": dict(self._identity.options),
            "sources": [dict(source) for source in sources],
            "counts": counts,
            "files": fmt.describe_files(self._folder),
        }
        meta["digest"] = fmt.content_digest(meta)
        (self._folder / fmt.META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        return meta["digest"]

    def close(self) -> None:
        """Release the files of a write that is given up."""
        self._tokens.close()
        if self._masks is not None:
            self._masks.close()

    def _add_mask(self, mask: np.ndarray | None) -> int:
        if mask is None:
            return -1
        if self._masks is None:
            self._masks = IndexedWriter(self._folder / fmt.MASKS, np.uint8)
        self._masks.add_document([mask])
        self._num_masks += 1
        return self._num_masks - 1

    def _max_row_tokens(self) -> int:
        """Longest prompt + response."""
        sizes_G = np.diff(np.frombuffer(self._first_response, dtype=np.int64))
        prompts_R = np.repeat(np.frombuffer(self._prompt_lengths, dtype=np.int32), sizes_G)
        return int((prompts_R + np.frombuffer(self._response_lengths, dtype=np.int32)).max(initial=0))


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
            DataError: it is not there, or it is another tokenizer (their digests differ).
        """
        made_with = self.meta["tokenizer"]
        if options is None:
            options = TokenizerOptions(**{key: made_with[key] for key in ("kind", "model", "chat_template")})
        tokenizer = load_tokenizer(options)
        if tokenizer.digest != made_with["digest"]:
            raise DataError(
                f"{self.path}: the store was made with the tokenizer {made_with['model']} (digest "
                f"{made_with['digest'][:16]}), but {options.model} has digest {tokenizer.digest[:16]}; give the "
                "store's own tokenizer, or run tools/preprocess_data.py with this one"
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
