"""Content of responses as hashes, and numbers of one scored store taken over for another that holds the same content.

A hash is 128 bits of BLAKE2b over the prompt's tokens, the response's tokens and its mask: all that a response's
log-probability depends on beside the weights. By it, a store that has grown, was reordered or was partitioned anew
takes the numbers of what was scored before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.types import GroupSample

HASH_WORDS = 2
"""uint64 words of a hash."""
_READ_AT_ONCE = 1 << 22
_MATCH_AT_ONCE = 1 << 23


def content_hashes(sample: GroupSample) -> np.ndarray:
    """[K, 2] uint64 hashes of a group's responses. A mask of all True hashes as no mask: they mean the same."""
    prompt = hashlib.blake2b(digest_size=8 * HASH_WORDS)
    prompt.update(len(sample.prompt_tokens).to_bytes(8, "little"))
    prompt.update(np.ascontiguousarray(sample.prompt_tokens, dtype="<i4").tobytes())
    digests = []
    for tokens, mask in zip(sample.response_tokens, sample.response_masks, strict=True):
        hasher = prompt.copy()
        hasher.update(len(tokens).to_bytes(8, "little"))
        hasher.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
        if mask is not None and not mask.all():
            hasher.update(np.packbits(mask).tobytes())
        digests.append(hasher.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, HASH_WORDS)


def group_hashes(store: TokenStore, start: int, stop: int) -> np.ndarray:
    """[n, 2] uint64 hashes of the responses of groups ``start`` to ``stop`` (exclusive)."""
    parts = [content_hashes(store[group_id]) for group_id in range(start, stop)]
    return np.concatenate([np.empty((0, HASH_WORDS), dtype=np.uint64), *parts])


def open_hashes(path: Path, num_responses: int) -> np.ndarray | None:
    """The hashes [R, 2] uint64 of a file, memory-mapped; None where it is absent or not of ``num_responses``."""
    if num_responses == 0 or not path.is_file() or path.stat().st_size != num_responses * 8 * HASH_WORDS:
        return None
    return np.memmap(path, dtype="<u8", mode="r", shape=(num_responses, HASH_WORDS))


def take_over(
    logps_R: np.ndarray,
    hashes_R2: np.ndarray,
    from_logps_R: np.ndarray,
    from_hashes_R2: np.ndarray,
    *,
    at_once: int = _MATCH_AT_ONCE,
) -> int:
    """Fill the NaN entries of ``logps_R`` [R] from another store's numbers of equal content; how many were filled.

    Both sides are read in parts: the content is split by its hash, so that about ``at_once`` numbers of the other
    store are sorted in memory at a time.
    """
    num_parts = max(1, -(-len(from_logps_R) // at_once))
    filled = 0
    for part in range(num_parts):
        hashes, logps = _scored(from_logps_R, from_hashes_R2, part, num_parts)
        if not len(logps):
            continue
        order = np.argsort(hashes[:, 0], kind="stable")
        hashes, logps = hashes[order], logps[order]
        for rows in _ranges(len(logps_R)):
            wanted = np.flatnonzero(np.isnan(logps_R[rows]) & (hashes_R2[rows, 0] % num_parts == part)) + rows.start
            content = np.asarray(hashes_R2[wanted])
            # Two contents that share the first word (none in practice) are told apart by the second, and scored.
            found = np.searchsorted(hashes[:, 0], content[:, 0]).clip(max=len(logps) - 1)
            same = (hashes[found] == content).all(1)
            logps_R[wanted[same]] = logps[found[same]]
            filled += int(same.sum())
    return filled


def _scored(logps_R: np.ndarray, hashes_R2: np.ndarray, part: int, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes [n, 2] and numbers [n] of one part of the content that has a number."""
    hashes, logps = [np.empty((0, HASH_WORDS), dtype=np.uint64)], [np.empty(0)]
    for rows in _ranges(len(logps_R)):
        mine = ~np.isnan(logps_R[rows]) & (hashes_R2[rows, 0] % num_parts == part)
        hashes.append(np.asarray(hashes_R2[rows][mine]))
        logps.append(np.asarray(logps_R[rows][mine]))
    return np.concatenate(hashes), np.concatenate(logps)


def _ranges(total: int) -> Iterator[slice]:
    return (slice(start, min(start + _READ_AT_ONCE, total)) for start in range(0, total, _READ_AT_ONCE))
