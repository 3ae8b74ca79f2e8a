"""Whether the files of a token store are still what was written: every byte is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from megatron_groupdpo.data.store import format as fmt
from megatron_groupdpo.errors import DataError

_BLOCK_BYTES = 1 << 22


def verify_store(folder: Path, *, on_bytes: Callable[[int], object] = lambda num_bytes: None) -> tuple[int, int]:
    """Compare size and SHA-256 of every file with ``meta.json``; returns the numbers of files and bytes read.

    ``on_bytes`` hears the number of bytes read since the last call.

    Raises:
        DataError: no store, ``meta.json`` was changed, or files are absent or differ: all of them are named
            with both numbers.
    """
    meta = fmt.read_meta(folder)
    wrong, num_bytes = [], 0
    for name, entry in meta["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name}: missing ({entry['bytes']:,} bytes were written)")
            continue
        size = path.stat().st_size
        num_bytes += size
        digest = _digest(path, on_bytes)
        if size != entry["bytes"]:
            wrong.append(f"{name}: {entry['bytes']:,} bytes were written, {size:,} are there")
        elif digest != entry["sha256"]:
            wrong.append(f"{name}: SHA-256 {entry['sha256']} was written, {digest} is there")
    if wrong:
        lines = "\n  ".join(wrong)
        raise DataError(
            f"{folder}: {len(wrong)} of {len(meta['files'])} files differ from {fmt.META} (digest "
            f"{meta['digest'][:16]}):\n  {lines}\ncopy the store again or run tools/preprocess_data.py again"
        )
    return len(meta["files"]), num_bytes


def store_bytes(folder: Path) -> int:
    """Bytes that :func:`verify_store` will read where nothing is cut short; DataError where this is no store."""
    return sum(entry["bytes"] for entry in fmt.read_meta(folder)["files"].values())


def _digest(path: Path, on_bytes: Callable[[int], object]) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            hasher.update(block)
            on_bytes(len(block))
    return hasher.hexdigest()
