"""Megatron's indexed ``.bin/.idx`` files, an index writer and a memory-mapped reader, on NumPy alone.

Format: megatron/core/datasets/indexed_dataset.py (0.19). The ``.bin`` file holds the tokens of all sequences one after
the other. The ``.idx`` file: ``MMIDIDX\0\0``, version (uint64, 1), code of the tokens' dtype (uint8), number of
sequences N (uint64), number of documents + 1 (uint64, D + 1); then lengths of the sequences (N int32), their byte
offsets (N int64), and the number of sequences before the end of each document (D + 1 int64, beginning with 0).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupdpo.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODES: dict[str, int] = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
_LARGEST_UINT16_VOCABULARY = 65_500


def token_dtype(vocab_size: int) -> type[np.number]:
    """uint16 where every id fits, int32 otherwise: Megatron's own choice (``DType.optimal_dtype``)."""
    return np.uint16 if vocab_size < _LARGEST_UINT16_VOCABULARY else np.int32


Blocks = Callable[[], Iterable[np.ndarray]]
"""One integer array in pieces, as often as it is asked for."""


def write_index(prefix: Path, dtype: type[np.number], *, sequence_lengths: Blocks, document_sizes: Blocks) -> None:
    """Write ``<prefix>.idx`` for a ``<prefix>.bin`` that holds the sequences one after the other.

    Megatron's builder keeps every length in a Python list; here memory is bounded by a block.

    Args:
        prefix: path of both files without their endings.
        dtype: of the tokens.
        sequence_lengths: tokens of each sequence.
        document_sizes: number of sequences of each document.
    """
    num_sequences = sum(len(block) for block in sequence_lengths())
    num_documents = sum(len(block) for block in document_sizes())
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(_MAGIC + _HEADER.pack(1, _CODES[np.dtype(dtype).name], num_sequences, num_documents + 1))
        for lengths in sequence_lengths():
            stream.write(lengths.astype("<i4").tobytes())
        offset = 0
        for lengths in sequence_lengths():
            ends = offset + np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        stream.write(np.zeros(1, dtype="<i8").tobytes())
        last = 0
        for sizes in document_sizes():
            ends = last + np.cumsum(sizes, dtype=np.int64)
            stream.write(ends.astype("<i8").tobytes())
            last = int(ends[-1])


class IndexedReader:
    """Memory-mapped sequences. Opening reads the header only."""

    def __init__(self, prefix: Path) -> None:
        """Map ``<prefix>.bin`` and ``<prefix>.idx``.

        Raises:
            DataError: the index is not one of this format, or is cut short.
        """
        index = Path(f"{prefix}.idx")
        start = len(_MAGIC) + _HEADER.size
        with index.open("rb") as stream:
            head = stream.read(start)
        if len(head) < start or not head.startswith(_MAGIC):
            raise DataError(f"{index}: not the index of a Megatron indexed dataset; restore it, or preprocess again")
        version, code, num_sequences, num_bounds = _HEADER.unpack(head[len(_MAGIC) :])
        names = {code: name for name, code in _CODES.items()}
        needed = start + num_sequences * (4 + 8) + num_bounds * 8
        if version != 1 or code not in names or index.stat().st_size != needed:
            raise DataError(
                f"{index}: version {version}, dtype code {code} and {index.stat().st_size} bytes do not make an index "
                f"of {num_sequences} sequences (version 1, {needed} bytes); restore it, or preprocess again"
            )
        self._dtype = np.dtype(names[code])
        self.sequence_lengths = _mapped(index, "<i4", num_sequences, start)
        """[number of sequences] int32, memory-mapped."""
        self._offsets = _mapped(index, "<i8", num_sequences, start + 4 * num_sequences)
        self.document_indices = _mapped(index, "<i8", num_bounds, start + 12 * num_sequences)
        """[number of documents + 1] int64: document d holds the sequences from entry d up to entry d + 1."""
        tokens = Path(f"{prefix}.bin")
        self._tokens = _mapped(tokens, self._dtype, tokens.stat().st_size // self._dtype.itemsize, 0)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """Sequences ``start`` to ``stop`` (exclusive) as views of the file, in its own dtype."""
        if start == stop:
            return []
        lengths = np.asarray(self.sequence_lengths[start:stop])
        first = int(self._offsets[start]) // self._dtype.itemsize  # what is written one after the other is read so
        ends = first + np.cumsum(lengths, dtype=np.int64)
        return [self._tokens[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist())]


def _mapped(file: Path, dtype: Any, count: int, offset: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    # A plain view: slicing a memmap object costs ten times as much.
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)
