"""Megatron's indexed ``.bin/.idx`` files, as a writer and a memory-mapped reader. Needs no CUDA.

Format: megatron/core/datasets/indexed_dataset.py (0.19): the ``.bin`` file holds the tokens of all sequences one
after the other, the ``.idx`` file their lengths and byte offsets and the sequence number at which each document ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    # Importing any part of Megatron warns that Transformer Engine is absent, which files do not need.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDataset,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )


def token_dtype(vocab_size: int) -> type[np.number]:
    """uint16 where every id fits, int32 otherwise: Megatron's own choice."""
    return DType.optimal_dtype(vocab_size)


class IndexedWriter:
    """Appends documents to ``<prefix>.bin``; ``<prefix>.idx`` is written by :meth:`finalize`."""

    def __init__(self, prefix: Path, dtype: type[np.number]) -> None:
        self._prefix = str(prefix)
        self._builder = IndexedDatasetBuilder(get_bin_path(self._prefix), dtype=dtype)

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Append one document of 1-D integer arrays."""
        # Megatron annotates a torch tensor but calls numpy.array on what it gets.
        tokens = np.concatenate([np.asarray(sequence) for sequence in sequences])
        self._builder.add_document(tokens, [len(sequence) for sequence in sequences])  # type: ignore[arg-type]

    def finalize(self) -> None:
        """Close the token file and write the index."""
        self._builder.finalize(get_idx_path(self._prefix))

    def close(self) -> None:
        """Close the token file without an index; for a write that is given up."""
        self._builder.data_file.close()  # pyright: ignore[reportAttributeAccessIssue]


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
