"""Prepared groups, one by one and as the flat arrays in which they travel from a worker process into a store."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGroup:
    """A tokenized, partitioned group on its way into a store. K responses; see ``GroupSample`` for the arrays."""

    prompt_tokens: np.ndarray
    """[P] int32."""
    response_tokens: tuple[np.ndarray, ...]
    """K arrays [L_k] int32."""
    response_masks: tuple[np.ndarray | None, ...]
    """K arrays [L_k] bool, or None: all True."""
    labels: tuple[int, ...]
    """+1 or -1."""
    values: tuple[float, ...]
    """NaN where the data give none."""
    ref_logps: tuple[float, ...]
    """Summed reference log-probabilities; NaN where the data give none or the text was truncated."""
    source_row: int
    """Line or row in the source, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBlock:
    """G >= 1 groups with R responses in all, one after the other: a few arrays, whatever G is."""

    tokens: np.ndarray
    """[N] int32: of each group the prompt, then the responses."""
    prompt_lengths_G: np.ndarray
    """[G] int32."""
    num_responses_G: np.ndarray
    """[G] int64."""
    source_rows_G: np.ndarray
    """[G] int64."""
    prompt_keys_G: np.ndarray
    """[G] uint32: see :func:`prompt_key`."""
    response_lengths_R: np.ndarray
    """[R] int32."""
    labels_R: np.ndarray
    """[R] int8."""
    values_R: np.ndarray
    """[R] float32."""
    ref_logps_R: np.ndarray
    """[R] float64."""
    is_masked_R: np.ndarray
    """[R] bool: whether the response has a mask."""
    masks: np.ndarray
    """uint8: the masks of those, one after the other."""


def prompt_key(prompt_tokens: np.ndarray) -> int:
    """CRC-32 of the ids as int32: what the split by prompt goes by."""
    return zlib.crc32(np.ascontiguousarray(prompt_tokens, dtype="<i4").tobytes())


def pack_groups(groups: Sequence[PreparedGroup]) -> GroupBlock:
    """The groups as flat arrays, in order."""
    sequences = [tokens for group in groups for tokens in (group.prompt_tokens, *group.response_tokens)]
    responses = [tokens for group in groups for tokens in group.response_tokens]
    masks = [mask for group in groups for mask in group.response_masks]
    given = [mask.astype(np.uint8) for mask in masks if mask is not None]
    return GroupBlock(
        tokens=np.concatenate(sequences, dtype=np.int32),
        prompt_lengths_G=np.array([len(group.prompt_tokens) for group in groups], dtype=np.int32),
        num_responses_G=np.array([len(group.response_tokens) for group in groups], dtype=np.int64),
        source_rows_G=np.array([group.source_row for group in groups], dtype=np.int64),
        prompt_keys_G=np.array([prompt_key(group.prompt_tokens) for group in groups], dtype=np.uint32),
        response_lengths_R=np.array([len(tokens) for tokens in responses], dtype=np.int32),
        labels_R=np.array([label for group in groups for label in group.labels], dtype=np.int8),
        values_R=np.array([value for group in groups for value in group.values], dtype=np.float32),
        ref_logps_R=np.array([logp for group in groups for logp in group.ref_logps], dtype=np.float64),
        is_masked_R=np.array([mask is not None for mask in masks], dtype=bool),
        masks=np.concatenate(given) if given else np.empty(0, dtype=np.uint8),
    )
