"""Groups made on the spot: ragged in size and length, one-sided ones and masked tokens among them."""

from __future__ import annotations

import numpy as np
from layout_case import SEQ_LENGTH, VOCAB_SIZE

from megatron_groupdpo.types import GroupSample

_SIDES = ((1, 1), (2, 3), (1, 4), (3, 1), (2, 0), (2, 2))
"""Positives and negatives of group g, repeating; the fifth has no negative, and no preference term."""


def make_samples(num_groups: int, *, seed: int = 0) -> list[GroupSample]:
    """Groups whose responses count 1 to 11 tokens; response 1 of every third group has a masked token."""
    draw = np.random.default_rng(seed)
    samples: list[GroupSample] = []
    first_response_id = 0
    for group_id in range(num_groups):
        num_positives, num_negatives = _SIDES[group_id % len(_SIDES)]
        labels_K = np.array([1] * num_positives + [-1] * num_negatives, dtype=np.int8)
        draw.shuffle(labels_K)
        prompt = draw.integers(0, VOCAB_SIZE, size=draw.integers(1, SEQ_LENGTH - 11), dtype=np.int32)
        lengths = draw.integers(1, 12, size=len(labels_K))
        responses = tuple(draw.integers(0, VOCAB_SIZE, size=length, dtype=np.int32) for length in lengths)
        masks: list[np.ndarray | None] = [None] * len(labels_K)
        if group_id % 3 == 0:
            masks[1] = np.arange(lengths[1]) != lengths[1] // 2 if lengths[1] > 1 else None
        samples.append(
            GroupSample(
                group_id=group_id,
                first_response_id=first_response_id,
                prompt_tokens=prompt,
                response_tokens=responses,
                response_masks=tuple(masks),
                labels_K=labels_K,
                values_K=draw.normal(size=len(labels_K)).astype(np.float32),
            )
        )
        first_response_id += len(labels_K)
    return samples


def reference_logps(samples: list[GroupSample], *, seed: int = 5) -> np.ndarray:
    """[all responses] float64, near what an untrained model gives, so that no sigmoid saturates."""
    draw = np.random.default_rng(seed)
    counts = [
        len(tokens) if mask is None else mask.sum()
        for sample in samples
        for tokens, mask in zip(sample.response_tokens, sample.response_masks)
    ]
    return np.array([-5.0 * count + draw.normal(scale=2.0) for count in counts])
