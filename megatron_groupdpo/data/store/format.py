"""The files of a token store and their digests.

``meta.json`` lists every file with its size, its SHA-256, and a *sampled* SHA-256 over its size and at most
64 evenly spaced blocks. Opening a store checks sizes and sampled digests, at a cost that does not grow with the
store; the full digests are for :meth:`TokenStore.verify`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_groupdpo.errors import DataError

FORMAT = "megatron_groupdpo token store"
VERSION = 2
META = "meta.json"
TOKENS = "tokens"
MASKS = "masks"
FIRST_RESPONSE, LABELS, VALUES = "first_response.npy", "labels.npy", "values.npy"
PROMPT_LENGTHS, RESPONSE_LENGTHS = "prompt_lengths.npy", "response_lengths.npy"
SOURCE_IDS, SOURCE_ROWS = "source_ids.npy", "source_rows.npy"
PROMPT_KEYS = "prompt_keys.npy"
MASK_ROWS, REF_LOGPS = "mask_rows.npy", "ref_logps.npy"

_NUM_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


def full_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_digest(path: Path) -> str:
    """SHA-256 of the size and of at most 64 blocks of 64 KiB, the first and the last among them."""
    size = path.stat().st_size
    hasher = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as stream:
        if size <= _NUM_BLOCKS * _BLOCK_BYTES:
            hasher.update(stream.read())
        else:
            for block in range(_NUM_BLOCKS):
                stream.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                hasher.update(stream.read(_BLOCK_BYTES))
    return hasher.hexdigest()


def describe_files(folder: Path, *, leave_out: Collection[str]) -> dict[str, dict[str, Any]]:
    """``{name: {bytes, sha256, sampled_sha256}}`` for every file but ``meta.json`` and ``leave_out``."""
    return {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": full_digest(path),
            "sampled_sha256": sampled_digest(path),
        }
        for path in sorted(folder.iterdir())
        if path.name != META and path.name not in leave_out
    }


def content_digest(meta: dict[str, Any]) -> str:
    """SHA-256 over what the store holds: file contents, tokenizer and options; not paths, counts or names."""
    files = {name: [entry["bytes"], entry["sha256"]] for name, entry in meta["files"].items()}
    parts = [FORMAT, meta["version"], files, meta["tokenizer"]["digest"], meta["options"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def meta_digest(meta: dict[str, Any]) -> str:
    """SHA-256 over all of ``meta.json`` but this number itself."""
    rest = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """The checked ``meta.json`` of a store.

    Raises:
        DataError: the folder is no store, has another version, or ``meta.json`` was changed.
    """
    way_out = "run tools/preprocess_data.py again"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such token store; {way_out}, or correct the path")
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: not a token store (no {META}); {way_out}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / META}: cannot be read ({error}); {way_out}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{folder / META}: not the description of a token store; {way_out}")
    if meta.get("version") != VERSION:
        raise DataError(
            f"{folder}: the store has format version {meta.get('version')}, this program reads {VERSION}; {way_out}"
        )
    computed = meta_digest(meta)
    if computed != meta.get("meta_sha256"):
        raise DataError(
            f"{folder}: the digest in {META} ({meta.get('meta_sha256')}) is not that of its contents ({computed}): "
            f"the file was changed; {way_out}"
        )
    return meta


def check_files(folder: Path, meta: dict[str, Any], *, full: bool) -> None:
    """Compare every file with ``meta``; DataError on the first that is absent, of another size, or changed."""
    for name, entry in meta["files"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing from the token store; run tools/preprocess_data.py again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DataError(
                f"{path}: the store is cut short or changed: {entry['bytes']} bytes were written, {size} are there; "
                "copy it again or run tools/preprocess_data.py again"
            )
        key, digest = ("sha256", full_digest) if full else ("sampled_sha256", sampled_digest)
        if digest(path) != entry[key]:
            raise DataError(
                f"{path}: its digest does not match {META}: the contents changed after they were written; "
                "copy it again or run tools/preprocess_data.py again"
            )
