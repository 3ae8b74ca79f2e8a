"""Safetensors files of a size limit, with their index, written as the tensors come."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_groupdpo.convert.hf.folder import INDEX, WEIGHTS
from megatron_groupdpo.convert.hf.json_text import with_values


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype_of: Callable[[str], torch.dtype],
    max_shard_size: int,
) -> tuple[int, int]:
    """Write the tensors, which come in the order of ``shapes``, each in its dtype; one file's are held at a time.

    Returns:
        The numbers of files and of bytes of tensors.

    Raises:
        OSError: the disk fails.
    """
    sizes = {name: torch.Size(shape).numel() * dtype_of(name).itemsize for name, shape in shapes.items()}
    files = assign_files(sizes, max_shard_size)
    counts = Counter(files.values())
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        # clone: a view of a larger tensor would be written with all of its storage
        held[name] = tensor.to(device="cpu", dtype=dtype_of(name)).clone(memory_format=torch.contiguous_format)
        assert held[name].shape == torch.Size(shapes[name]), name
        file = files[name]
        if len(held) == counts[file]:
            assert all(files[other] == file for other in held)
            _save(held, folder / file)
            held = {}
    assert not held
    if len(counts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / INDEX, index)
    return len(counts), sum(sizes.values())


def assign_files(sizes: Mapping[str, int], max_shard_size: int) -> dict[str, str]:
    """File name of each tensor, in order: a new file where the next tensor would exceed the limit."""
    numbers, number, used = {}, 1, 0
    for name, size in sizes.items():
        if used and used + size > max_shard_size:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    if number == 1:
        return dict.fromkeys(sizes, WEIGHTS)
    stem = WEIGHTS.removesuffix(".safetensors")
    return {name: f"{stem}-{index:05d}-of-{number:05d}.safetensors" for name, index in numbers.items()}


def write_json(file: Path, value: Mapping[str, Any], *, text: str | None = None) -> None:
    """``text`` with the values changed that are not as in ``value``.

    A form of our own without text, and where ``value`` lacks some of it: a model of another family has other fields.
    """
    before: dict[str, Any] = {} if text is None else json.loads(text)
    if text is None or before.keys() - value.keys():
        file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return
    changed = {name: new for name, new in value.items() if name not in before or before[name] != new}
    file.write_text(with_values(text, changed), encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from error
