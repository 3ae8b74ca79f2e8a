"""Reference log-probabilities on disk: one float64 per response of a token store.

A reference folder holds one subfolder per token store, named by the store's digest:

    logps.npy    [R] float64, NaN where not scored yet; memory-mapped
    content.bin  [R, 2] uint64, the content of each response as a hash (reference/content.py)
    meta.json    what the numbers mean: digests of store and weights, precision, version of the scoring

so that one folder serves training and validation data, and a store that has grown takes over what was scored of it
before. Numbers are sums over the response's counted tokens; they do not depend on the layout, the micro-batch size or
how responses are averaged later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.reference.content import open_hashes, take_over

SCORING_VERSION = 2
"""Raised by hand when the meaning of the stored numbers changes."""
_LOGPS, _CONTENT, _META = "logps.npy", "content.bin", "meta.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKey:
    """What stored numbers depend on."""

    store_digest: str
    weights_digest: str
    """Of the weights and of what the model computes with them: ``Policy.weights_digest``."""
    precision: str
    """``fp32``, ``bf16`` or an FP8 recipe: :func:`megatron_groupdpo.config.fp8.precision_name`."""
    scoring_version: int = SCORING_VERSION


class ReferenceWriter:
    """Fills the log-probabilities of one token store; picks up where an earlier run with the same key stopped."""

    def __init__(self, root: Path, store: TokenStore, key: ReferenceKey) -> None:
        self.key = key
        self.folder = store_folder(root, store)
        if self.folder.exists():
            _check_key(self.folder, _read_key(self.folder), key)
        else:
            temporary = self.folder.with_name(f"{self.folder.name}.tmp{os.getpid()}")
            temporary.mkdir(parents=True)
            np.save(temporary / _LOGPS, np.full(store.num_responses, np.nan))
            (temporary / _META).write_text(json.dumps(asdict(key), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder)
        self._logps_R = np.load(self.folder / _LOGPS, mmap_mode="r+")

    def missing(self) -> np.ndarray:
        """[M] int64 rows of the store's response table without a number."""
        return np.flatnonzero(np.isnan(self._logps_R))

    def put(self, response_ids_R: np.ndarray, logps_R: np.ndarray) -> None:
        """Store log-probabilities [R] float64 of responses [R] int64; on disk when this returns."""
        self._logps_R[response_ids_R] = logps_R
        self._logps_R.flush()  # type: ignore[attr-defined]

    @property
    def knows_content(self) -> bool:
        """Whether the hashes of the responses are there."""
        return open_hashes(self.folder / _CONTENT, len(self._logps_R)) is not None

    def write_content(self, blocks: Iterable[np.ndarray]) -> None:
        """Store the hashes of all responses, given in order as [n, 2] uint64 blocks; there whole or not at all."""
        temporary = self.folder / f"{_CONTENT}.tmp{os.getpid()}"
        with temporary.open("wb") as stream:
            for block in blocks:
                stream.write(np.ascontiguousarray(block, dtype="<u8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.folder / _CONTENT)
        assert self.knows_content

    def take_over(self) -> int:
        """Fill missing numbers from the root's other folders of the same weights, precision and scoring version.

        Responses are matched by content; how many were filled.
        """
        hashes_R2 = open_hashes(self.folder / _CONTENT, len(self._logps_R))
        assert hashes_R2 is not None
        filled = 0
        for folder in sorted(self.folder.parent.iterdir()):
            if folder == self.folder or not np.isnan(self._logps_R).any():
                continue
            other = _scored_alike(folder, self.key)
            if other is not None:
                filled += take_over(self._logps_R, hashes_R2, *other)
        self._logps_R.flush()  # type: ignore[attr-defined]
        return filled


class ReferenceLogProbs:
    """Reads the numbers of several token stores as one flat table, as :class:`GroupDataset` numbers responses."""

    def __init__(self, keys: Sequence[ReferenceKey], parts: Sequence[np.ndarray]) -> None:
        self.keys = tuple(keys)
        self._parts = tuple(parts)
        self._first = np.cumsum([0, *(len(part) for part in self._parts)])

    @classmethod
    def open(cls, root: Path, stores: Sequence[TokenStore], *, precision: str) -> ReferenceLogProbs:
        """Open the numbers of ``stores``.

        Raises:
            DataError: a store was not scored, or only in part; with another precision; by another scoring version.
        """
        keys, parts = [], []
        for store in stores:
            folder = store_folder(root, store)
            if not folder.is_dir():
                raise DataError(
                    f"{root} has no reference log-probabilities of the store {store.path} (digest "
                    f"{store.digest[:16]}); run tools/score_reference.py on it"
                )
            key = _read_key(folder)
            wanted = ReferenceKey(store_digest=store.digest, weights_digest=key.weights_digest, precision=precision)
            _check_key(folder, key, wanted)
            keys.append(key)
            parts.append(_read_logps(folder, store))
        digests = sorted({key.weights_digest for key in keys})
        if len(digests) > 1:
            raise DataError(
                f"{root}: the stores were scored by different weights ({', '.join(digests)}); score all with one model"
            )
        return cls(keys, parts)

    @property
    def weights_digest(self) -> str:
        """Digest of the weights that scored all stores."""
        return self.keys[0].weights_digest

    def __getitem__(self, response_ids_R: np.ndarray) -> np.ndarray:
        """Summed log-probabilities [R] float64 of responses [R] int64, numbered over all stores."""
        parts = np.searchsorted(self._first, response_ids_R, side="right") - 1
        logps_R = np.empty(len(response_ids_R), dtype=np.float64)
        for part in np.unique(parts):
            mine = parts == part
            logps_R[mine] = self._parts[part][response_ids_R[mine] - self._first[part]]
        return logps_R


def store_folder(root: Path, store: TokenStore) -> Path:
    """Where a token store's numbers are under a reference folder."""
    return root / store.digest[:16]


def _scored_alike(folder: Path, key: ReferenceKey) -> tuple[np.ndarray, np.ndarray] | None:
    """Numbers [R] and hashes [R, 2] of a folder, or None where it is of another key, or lacks a file."""
    try:
        found = _read_key(folder)
        logps_R = np.load(folder / _LOGPS, mmap_mode="r")
    except (DataError, OSError, ValueError):
        return None  # not a folder of numbers, or one that is being written
    hashes_R2 = open_hashes(folder / _CONTENT, len(logps_R))
    if hashes_R2 is None or replace(found, store_digest=key.store_digest) != key:
        return None
    return logps_R, hashes_R2


def _read_logps(folder: Path, store: TokenStore) -> np.ndarray:
    logps_R = np.load(folder / _LOGPS, mmap_mode="r")
    if logps_R.shape != (store.num_responses,):
        raise DataError(
            f"{folder / _LOGPS}: has {logps_R.shape} numbers, the store {store.path} has {store.num_responses} "
            "responses; delete the folder and score again"
        )
    missing = int(np.isnan(logps_R).sum())
    if missing:
        raise DataError(
            f"{folder}: {missing} of {store.num_responses} responses have no number; run tools/score_reference.py "
            "again, it goes on where it stopped"
        )
    return logps_R


def _read_key(folder: Path) -> ReferenceKey:
    try:
        return ReferenceKey(**json.loads((folder / _META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / _META}: not the description of reference log-probabilities: {error}") from error


def _check_key(folder: Path, found: ReferenceKey, wanted: ReferenceKey) -> None:
    for name, value in asdict(wanted).items():
        if getattr(found, name) != value:
            raise DataError(
                f"{folder}: scored with {name} {getattr(found, name)!r}, this run needs {value!r}; "
                "score into another folder"
            )
