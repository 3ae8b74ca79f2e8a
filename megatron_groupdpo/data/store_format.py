"""The files of a token store, their digests, and the folder that appears whole or not at all.

``meta.json`` lists every file with its size, its SHA-256, and a *sampled* SHA-256 over its size and at most
64 evenly spaced blocks. Opening a store checks sizes and sampled digests, at a cost that does not grow with the
store; the full digests are for :meth:`TokenStore.verify`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_groupdpo.errors import DataError

FORMAT = "megatron_groupdpo token store"
VERSION = 1
META = "meta.json"
TOKENS = "tokens"
MASKS = "masks"
FIRST_RESPONSE, LABELS, VALUES = "first_response.npy", "labels.npy", "values.npy"
PROMPT_LENGTHS, RESPONSE_LENGTHS = "prompt_lengths.npy", "response_lengths.npy"
SOURCE_IDS, SOURCE_ROWS = "source_ids.npy", "source_rows.npy"
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


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """``{name: {bytes, sha256, sampled_sha256}}`` for every file but ``meta.json``."""
    return {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": full_digest(path),
            "sampled_sha256": sampled_digest(path),
        }
        for path in sorted(folder.iterdir())
        if path.name != META
    }


def content_digest(meta: dict[str, Any]) -> str:
    """SHA-256 over what the store holds: file contents, tokenizer and options; not paths, counts or names."""
    files = {name: [entry["bytes"], entry["sha256"]] for name, entry in meta["files"].items()}
    parts = [FORMAT, meta["version"], files, meta["tokenizer"]["digest"], meta["options"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
    try:
        computed = content_digest(meta)
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{folder / META}: incomplete; {way_out}") from None
    if computed != meta.get("digest"):
        raise DataError(
            f"{folder}: the digest in {META} ({meta.get('digest')}) is not that of its contents ({computed}): "
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


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of ``target`` to write into, renamed to ``target`` when the block ends without error.

    Raises:
        DataError: ``target`` exists and ``overwrite`` is off, or it is not a token store; the disk fails.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial = target.with_name(f".{target.name}.partial-{socket.gethostname()}-{os.getpid()}")
        partial.mkdir()
    except OSError as error:
        raise DataError(f"{target}: cannot be created ({error.strerror}); choose another --output") from None
    try:
        yield partial
        for path in partial.iterdir():
            _to_disk(path)
        _replace(partial, target, overwrite)
    except OSError as error:
        raise DataError(
            f"{target}: writing failed ({error.strerror or error}); nothing was kept. Free space or correct the path"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{target}: exists already; pass --overwrite to replace it, or choose another --output")
    if not (target / META).is_file():
        raise DataError(f"{target}: --overwrite replaces token stores only, and this is none; choose another path")


def _replace(partial: Path, target: Path, overwrite: bool) -> None:
    _check_target(target, overwrite)  # another process may have finished first
    if target.exists():
        aside = target.with_name(partial.name + ".old")
        os.rename(target, aside)
        os.rename(partial, target)
        shutil.rmtree(aside)
    else:
        os.rename(partial, target)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Delete what a killed run on this machine left beside ``target``."""
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        owner = path.name.removeprefix(prefix)
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
