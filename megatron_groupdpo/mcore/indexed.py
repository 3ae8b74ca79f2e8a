"""Megatron's indexed ``.bin/.idx`` files, an index writer and a memory-mapped reader. Needs no CUDA.

Format: megatron/core/datasets/indexed_dataset.py (0.19): the ``.bin`` file holds the tokens of all sequences one
after the other, the ``.idx`` file their lengths and byte offsets and the sequence number at which each document ends.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    # Importing any part of Megatron warns that Transformer Engine is absent, which files do not need.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDataset, get_idx_path


def token_dtype(vocab_size: int) -> type[np.number]:
    """uint16 where every id fits, int32 otherwise: Megatron's own choice."""
    return DType.optimal_dtype(vocab_size)


Blocks = Callable[[], Iterable[np.ndarray]]
"""One integer array in pieces, as often as it is asked for."""


def write_index(prefix: Path, dtype: type[np.number], *, sequence_lengths: Blocks, document_sizes: Blocks) -> None:
    """Write ``<prefix>.idx`` for a ``<prefix>.bin`` that holds the sequences one after the other.

    Megatron's builder keeps every length in a Python list; here memory is bounded by a block.

    Args:
        dtype: of the tokens.
        sequence_lengths: tokens of each sequence.
        document_sizes: number of sequences of each document.
    """
    num_sequences = sum(len(block) for block in sequence_lengths())
    num_documents = sum(len(block) for block in document_sizes())
    header = _INDEX_HEADER + struct.pack("<QBQQ", 1, DType.code_from_dtype(dtype), num_sequences, num_documents + 1)
    with open(get_idx_path(str(prefix)), "wb") as stream:
        stream.write(header)
        for lengths in sequence_lengths():
            stream.write(lengths.astype(np.int32).tobytes())
        offset = 0
        for lengths in sequence_lengths():
            ends = offset + np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])
        stream.write(np.zeros(1, dtype=np.int64).tobytes())
        last = 0
        for sizes in document_sizes():
            ends = last + np.cumsum(sizes, dtype=np.int64)
            stream.write(ends.tobytes())
            last = int(ends[-1])


class IndexedReader:
    """Memory-mapped sequences. Opening reads the header only."""

    def __init__(self, prefix: Path) -> None:
        self._dataset = IndexedDataset(str(prefix), mmap=True)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """[number of sequences] int32, memory-mapped."""
        return self._dataset.sequence_lengths

    @property
    def document_indices(self) -> np.ndarray:
        """[number of documents + 1] int64: document d holds the sequences from entry d up to entry d + 1."""
        return self._dataset.document_indices

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """Sequences ``start`` to ``stop`` (exclusive) as views of the file, in its own dtype."""
        return self._dataset[start:stop]  # type: ignore[return-value]
