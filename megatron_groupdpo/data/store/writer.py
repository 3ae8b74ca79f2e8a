"""Writes a token store as a stream: every array is a file that only grows, so that memory stays bounded and a
killed write goes on from its last :meth:`StoreWriter.commit`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_groupdpo.data.store import format as fmt
from megatron_groupdpo.data.store.indexed import token_dtype, write_index


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGroup:
    """A tokenized, partitioned group on its way into a store. K responses; see ``GroupSample`` for the arrays."""

    prompt_tokens: np.ndarray
    """[P] int32."""
    response_tokens: tuple[np.ndarray, ...]
    """K arrays [L_k] int32."""
    response_masks: tuple[np.ndarray | None, ...]
    """K arrays [L_k] bool, or None: all True."""
    labels: tuple[int, ...]
    """+1 or -1."""
    values: tuple[float, ...]
    """NaN where the data give none."""
    ref_logps: tuple[float, ...]
    """Summed reference log-probabilities; NaN where the data give none or the text was truncated."""
    source_row: int
    """Line or row in the source, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBlock:
    """G >= 1 groups with R responses in all, one after the other: a few arrays, whatever G is."""

    tokens: np.ndarray
    """[N] int32: of each group the prompt, then the responses."""
    prompt_lengths_G: np.ndarray
    """[G] int32."""
    num_responses_G: np.ndarray
    """[G] int64."""
    source_rows_G: np.ndarray
    """[G] int64."""
    prompt_keys_G: np.ndarray
    """[G] uint32: see :func:`prompt_key`."""
    response_lengths_R: np.ndarray
    """[R] int32."""
    labels_R: np.ndarray
    """[R] int8."""
    values_R: np.ndarray
    """[R] float32."""
    ref_logps_R: np.ndarray
    """[R] float64."""
    is_masked_R: np.ndarray
    """[R] bool: whether the response has a mask."""
    masks: np.ndarray
    """uint8: the masks of those, one after the other."""


def prompt_key(prompt_tokens: np.ndarray) -> int:
    """CRC-32 of the ids as int32: what the split by prompt goes by."""
    return zlib.crc32(np.ascontiguousarray(prompt_tokens, dtype="<i4").tobytes())


def pack_groups(groups: Sequence[PreparedGroup]) -> GroupBlock:
    """The groups as flat arrays, in order."""
    sequences = [tokens for group in groups for tokens in (group.prompt_tokens, *group.response_tokens)]
    responses = [tokens for group in groups for tokens in group.response_tokens]
    masks = [mask for group in groups for mask in group.response_masks]
    given = [mask.astype(np.uint8) for mask in masks if mask is not None]
    return GroupBlock(
        tokens=np.concatenate(sequences, dtype=np.int32),
        prompt_lengths_G=np.array([len(group.prompt_tokens) for group in groups], dtype=np.int32),
        num_responses_G=np.array([len(group.response_tokens) for group in groups], dtype=np.int64),
        source_rows_G=np.array([group.source_row for group in groups], dtype=np.int64),
        prompt_keys_G=np.array([prompt_key(group.prompt_tokens) for group in groups], dtype=np.uint32),
        response_lengths_R=np.array([len(tokens) for tokens in responses], dtype=np.int32),
        labels_R=np.array([label for group in groups for label in group.labels], dtype=np.int8),
        values_R=np.array([value for group in groups for value in group.values], dtype=np.float32),
        ref_logps_R=np.array([logp for group in groups for logp in group.ref_logps], dtype=np.float64),
        is_masked_R=np.array([mask is not None for mask in masks], dtype=bool),
        masks=np.concatenate(given) if given else np.empty(0, dtype=np.uint8),
    )


_BLOCK_GROUPS = 1 << 18  # groups whose lengths are in memory at once while the index is written


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """What a store was made with."""

    tokenizer: Mapping[str, Any]
    """``digest``, ``vocab_size``, ``bos_id``, ``eos_id``, ``pad_id``, ``kind``, ``model``, ``chat_template``."""
    options: Mapping[str, Any]
    """Everything else that decides the contents, as plain JSON."""


@dataclass(slots=True, kw_only=True)
class Written:
    """How much a store holds so far; with it a write goes on."""

    groups: int = 0
    responses: int = 0
    tokens: int = 0
    masks: int = 0
    mask_tokens: int = 0
    max_row_tokens: int = 0
    ref_logps: int = 0
    """Responses with a reference log-probability."""


class StoreWriter:
    """Writes the files of a store into a folder; see ``work_folder.whole_folder``.

    Args:
        written: what :meth:`commit` returned, to go on there; the files are cut back to it. None: an empty folder.

    Raises:
        ValueError: a file of the folder holds less than ``written`` says.
    """

    def __init__(self, folder: Path, identity: StoreIdentity, written: Written | None = None) -> None:
        self._folder, self._identity = folder, identity
        self._written = written = Written() if written is None else written
        self._dtype = token_dtype(identity.tokenizer["vocab_size"])
        groups, responses = written.groups, written.responses
        lengths: dict[str, tuple[type, int]] = {
            fmt.FIRST_RESPONSE: (np.int64, groups + 1 if groups else 0),
            fmt.PROMPT_LENGTHS: (np.int32, groups),
            fmt.PROMPT_KEYS: (np.uint32, groups),
            fmt.SOURCE_IDS: (np.int32, groups),
            fmt.SOURCE_ROWS: (np.int64, groups),
            fmt.LABELS: (np.int8, responses),
            fmt.VALUES: (np.float32, responses),
            fmt.RESPONSE_LENGTHS: (np.int32, responses),
            fmt.REF_LOGPS: (np.float64, responses),
            fmt.MASK_ROWS: (np.int64, responses),
            _MASK_LENGTHS: (np.int32, written.masks),
        }
        for path in folder.iterdir():
            if path.name not in {*lengths, _bin(fmt.TOKENS), _bin(fmt.MASKS)}:
                path.unlink()  # of a finish that did not end
        self._arrays: dict[str, _GrowingArray] = {}
        try:
            for name, (dtype, length) in lengths.items():
                self._arrays[name] = _GrowingArray(folder / name, dtype, length)
            for name, dtype, length in (
                (_bin(fmt.TOKENS), self._dtype, written.tokens),
                (_bin(fmt.MASKS), np.uint8, written.mask_tokens),
            ):
                self._arrays[name] = _GrowingArray(folder / name, dtype, length, has_header=False)
        except BaseException:
            self.close()
            raise
        if not groups:
            self._arrays[fmt.FIRST_RESPONSE].append(np.zeros(1))

    def add(self, group: PreparedGroup, source_id: int) -> None:
        """Append one group of source ``source_id``."""
        self.add_block(pack_groups([group]), source_id)

    def add_block(self, block: GroupBlock, source_id: int) -> None:
        """Append groups of source ``source_id``."""
        written = self._written
        num_groups, num_responses = len(block.prompt_lengths_G), len(block.labels_R)
        assert block.num_responses_G.min() >= 1
        assert block.prompt_lengths_G.min() >= 1
        assert block.num_responses_G.sum() == num_responses == len(block.values_R) == len(block.ref_logps_R)
        assert len(block.tokens) == block.prompt_lengths_G.sum() + block.response_lengths_R.sum()
        mask_rows_R = np.full(num_responses, -1, dtype=np.int64)
        num_masks = int(block.is_masked_R.sum())
        mask_rows_R[block.is_masked_R] = written.masks + np.arange(num_masks)
        for name, values in (
            (_bin(fmt.TOKENS), block.tokens),
            (_bin(fmt.MASKS), block.masks),
            (_MASK_LENGTHS, block.response_lengths_R[block.is_masked_R]),
            (fmt.FIRST_RESPONSE, written.responses + np.cumsum(block.num_responses_G)),
            (fmt.PROMPT_LENGTHS, block.prompt_lengths_G),
            (fmt.PROMPT_KEYS, block.prompt_keys_G),
            (fmt.SOURCE_IDS, np.full(num_groups, source_id)),
            (fmt.SOURCE_ROWS, block.source_rows_G),
            (fmt.LABELS, block.labels_R),
            (fmt.VALUES, block.values_R),
            (fmt.RESPONSE_LENGTHS, block.response_lengths_R),
            (fmt.REF_LOGPS, block.ref_logps_R),
            (fmt.MASK_ROWS, mask_rows_R),
        ):
            self._arrays[name].append(values)
        rows_R = np.repeat(block.prompt_lengths_G, block.num_responses_G) + block.response_lengths_R
        written.groups += num_groups
        written.responses += num_responses
        written.tokens += len(block.tokens)
        written.masks += num_masks
        written.mask_tokens += len(block.masks)
        written.max_row_tokens = max(written.max_row_tokens, int(rows_R.max()))
        written.ref_logps += int((~np.isnan(block.ref_logps_R)).sum())

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk; returns :class:`Written` as plain JSON."""
        for growing in self._arrays.values():
            growing.sync()
        return asdict(self._written)

    def finish(self, *, sources: Sequence[Mapping[str, Any]], counts: Any) -> str:
        """Write the indices and ``meta.json``; returns the store's digest."""
        written = self._written
        self.close()
        self._write_indices()
        unused = self._unused()
        meta: dict[str, Any] = {
            "format": fmt.FORMAT,
            "version": fmt.VERSION,
            "num_groups": written.groups,
            "num_responses": written.responses,
            "num_tokens": written.tokens,
            "max_row_tokens": written.max_row_tokens,
            "tokenizer": dict(self._identity.tokenizer),
            "options": dict(self._identity.options),
            "sources": [dict(source) for source in sources],
            "counts": counts,
            "files": fmt.describe_files(self._folder, leave_out=unused),
        }
        meta["digest"] = fmt.content_digest(meta)
        meta["meta_sha256"] = fmt.meta_digest(meta)
        (self._folder / fmt.META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for name in unused:  # last: a write that is killed before goes on from its commit
            (self._folder / name).unlink()
        return meta["digest"]

    def close(self) -> None:
        """Close the files, also of a write that is given up."""
        with ExitStack() as stack:  # all of them, also when one cannot be flushed
            for growing in self._arrays.values():
                stack.callback(growing.close)

    def _write_indices(self) -> None:
        first_G1, prompts_G, responses_R, masks = (
            np.load(self._folder / name, mmap_mode="r")
            for name in (fmt.FIRST_RESPONSE, fmt.PROMPT_LENGTHS, fmt.RESPONSE_LENGTHS, _MASK_LENGTHS)
        )

        def sequence_lengths() -> Iterator[np.ndarray]:
            for start in range(0, len(prompts_G), _BLOCK_GROUPS):
                first = np.asarray(first_G1[start : start + _BLOCK_GROUPS + 1])
                is_prompt = np.zeros(int(first[-1] - first[0]) + len(first) - 1, dtype=bool)
                is_prompt[first[:-1] - first[0] + np.arange(len(first) - 1)] = True
                lengths = np.empty(len(is_prompt), dtype=np.int32)
                lengths[is_prompt] = prompts_G[start : start + _BLOCK_GROUPS]
                lengths[~is_prompt] = responses_R[first[0] : first[-1]]
                yield lengths

        def document_sizes() -> Iterator[np.ndarray]:
            for start in range(0, len(prompts_G), _BLOCK_GROUPS):
                yield np.diff(first_G1[start : start + _BLOCK_GROUPS + 1]) + 1

        def mask_lengths() -> Iterator[np.ndarray]:
            return (masks[start : start + _BLOCK_GROUPS] for start in range(0, len(masks), _BLOCK_GROUPS))

        def mask_documents() -> Iterator[np.ndarray]:
            return (np.ones(len(block), dtype=np.int64) for block in mask_lengths())

        write_index(
            self._folder / fmt.TOKENS, self._dtype, sequence_lengths=sequence_lengths, document_sizes=document_sizes
        )
        if self._written.masks:
            write_index(
                self._folder / fmt.MASKS, np.uint8, sequence_lengths=mask_lengths, document_sizes=mask_documents
            )

    def _unused(self) -> set[str]:
        """Files that the finished store goes without."""
        unused = {_MASK_LENGTHS}
        if not self._written.masks:
            unused |= {_bin(fmt.MASKS), fmt.MASK_ROWS}
        if not self._written.ref_logps:
            unused.add(fmt.REF_LOGPS)
        return unused


_MASK_LENGTHS = "mask_lengths.npy"


def _bin(name: str) -> str:
    return f"{name}.bin"


class _GrowingArray:
    """A flat ``.npy`` file (or, without header, the bare numbers) that grows at its end."""

    def __init__(self, path: Path, dtype: type[np.number], length: int, *, has_header: bool = True) -> None:
        self._path, self._dtype, self._length, self._has_header = path, np.dtype(dtype), length, has_header
        self._stream: IO[bytes] = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by close()
        try:
            self._write_header(length)
            header = self._stream.tell()
            self._stream.flush()
            there = os.fstat(self._stream.fileno()).st_size
            if there < header + length * self._dtype.itemsize:
                raise ValueError(f"{path}: {there} bytes are there, {length} numbers of {self._dtype} were written")
            self._stream.truncate(header + length * self._dtype.itemsize)
            self._stream.seek(0, os.SEEK_END)
        except BaseException:
            self._stream.close()
            raise

    def append(self, values: np.ndarray) -> None:
        self._stream.write(np.ascontiguousarray(values, dtype=self._dtype).data.cast("B") if len(values) else b"")
        self._length += len(values)

    def sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        if self._stream.closed:
            return
        try:
            self._stream.flush()
            self._write_header(self._length)
        finally:
            self._stream.close()

    def _write_header(self, length: int) -> None:
        """numpy leaves room in it for the length to grow, so its size never changes."""
        self._stream.seek(0)
        if self._has_header:
            shape = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(self._stream, shape)
