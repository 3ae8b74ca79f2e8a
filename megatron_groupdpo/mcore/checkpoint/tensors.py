"""Tensors of a distributed checkpoint read one by one, without a model and without ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_groupdpo.errors import CheckpointError


class CheckpointTensors:
    """What an ``iter_`` folder holds, whatever layout saved it: tensors of the model and of the optimizer by name.

    A tensor of a layer is stored as one of all layers, [L, ...]. Objects that are no tensors, as the ``_extra_state``
    of Transformer Engine's layers, are not among them.
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: not a distributed checkpoint, or unreadable.
        """
        self.folder = folder
        self._reader = FileSystemReader(str(folder))
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except Exception as error:  # whatever unpickling a damaged file raises
            raise CheckpointError(f"{folder} cannot be read as a distributed checkpoint: {error}") from error
        self._stored = {
            name: value
            for name, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape by name."""
        return {name: tuple(stored.size) for name, stored in self._stored.items()}

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._stored[name].properties.dtype

    def read(self, name: str, first: Sequence[int] = (), *, rows: int | None = None) -> Tensor:
        """A tensor, or a part of it, in host memory; beside it, one saved shard at a time is held.

        Args:
            name: as in :attr:`shapes`.
            first: indices of the leading dimensions, which the result lacks; the layer, say.
            rows: take so many rows only, from the first.

        Raises:
            CheckpointError: a file is missing, damaged or incomplete.
        """
        stored = self._stored[name]
        shape = list(stored.size[len(first) :])
        if rows is not None:
            shape[0] = rows
        window = ChunkStorageMetadata(
            offsets=torch.Size([*first, *(0 for _ in shape)]), sizes=torch.Size([*(1 for _ in first), *shape])
        )
        whole = torch.empty(window.sizes, dtype=stored.properties.dtype, device="cpu")
        items = create_read_items_for_chunk_list(name, stored, [window])
        found = sum(item.lengths.numel() for item in items)
        if found != whole.numel():
            raise CheckpointError(f"{self.folder}: tensor {name!r} is incomplete, {found} of {whole.numel()} numbers")
        try:
            self._reader.read_data(LoadPlan(items), _Into(whole))  # type: ignore[arg-type]
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} cannot be read ({type(error).__name__}: "
                f"{reason[-1] if reason else 'no reason'}); the folder is damaged or incomplete"
            ) from error
        return whole.reshape(shape)


class _Into:
    """The part of torch's load planner that a reader of tensors calls: where each piece goes."""

    def __init__(self, whole: Tensor) -> None:
        self._whole = whole

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        place = tuple(slice(start, start + size) for start, size in zip(item.dest_offsets, item.lengths))
        return self._whole[place]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the piece is a view."""
