"""From sampled groups to the global batch: which responses get a pass, in which flat order."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_groupdpo.types import GroupBatch, GroupSample, ResponseRow


def build_batch(
    samples: Sequence[GroupSample],
    *,
    group_keys_G: torch.Tensor,
    needs_pass: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> GroupBatch:
    """Arrange groups as padded [G, K] arrays and flatten the responses that need a pass.

    Args:
        samples: G groups.
        group_keys_G: [G] int64, source of random draws.
        needs_pass: from the keyword arrays ``labels_GK, values_GK, tie_keys_GK, group_keys_G`` to [G, K] bool, the
            responses the loss reads. The others get no pass.
    """
    shape = (len(samples), max(len(sample.response_tokens) for sample in samples))
    labels_GK = torch.zeros(shape, dtype=torch.int8)
    values_GK = torch.full(shape, float("nan"), dtype=torch.float64)
    tie_keys_GK = torch.zeros(shape, dtype=torch.int64)
    for g, sample in enumerate(samples):
        size = len(sample.response_tokens)
        labels_GK[g, :size] = torch.from_numpy(sample.labels_K.astype(np.int8))
        values_GK[g, :size] = torch.from_numpy(sample.values_K.astype(np.float64))
        keys = [zlib.crc32(np.ascontiguousarray(tokens, dtype="<i4").tobytes()) for tokens in sample.response_tokens]
        tie_keys_GK[g, :size] = torch.tensor(keys, dtype=torch.int64)
    arrays = {
        "labels_GK": labels_GK,
        "values_GK": values_GK,
        "tie_keys_GK": tie_keys_GK,
        "group_keys_G": group_keys_G,
    }
    passes_GK = needs_pass(arrays) & (labels_GK != 0)
    flat_index_GK = torch.full(shape, -1, dtype=torch.int64)
    flat_index_GK[passes_GK] = torch.arange(int(passes_GK.sum()))

    rows, response_ids = [], []
    for g, k in passes_GK.nonzero().tolist():
        rows.append(_row(len(rows), samples[g], k))
        response_ids.append(samples[g].first_response_id + k)
    return GroupBatch(
        rows=tuple(rows),
        flat_index_GK=flat_index_GK,
        response_ids_R=torch.tensor(response_ids, dtype=torch.int64),
        num_tokens_R=torch.tensor([len(row.target_positions_T) for row in rows], dtype=torch.int64),
        **arrays,
    )


def _row(index: int, sample: GroupSample, k: int) -> ResponseRow:
    response, mask = sample.response_tokens[k], sample.response_masks[k]
    start = len(sample.prompt_tokens)
    positions_T = np.arange(start, start + len(response))
    return ResponseRow(
        index=index,
        tokens_S=np.concatenate([sample.prompt_tokens, response]),
        target_positions_T=positions_T if mask is None else positions_T[mask],
    )
