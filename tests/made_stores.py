"""Token stores of ragged groups, made on the spot and known in full, each number of them different from any other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from megatron_groupdpo.data.preprocess.work_folder import whole_folder
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.store.writer import PreparedGroup, StoreIdentity, StoreWriter
from megatron_groupdpo.reference.store import ReferenceKey, ReferenceWriter

VOCAB_SIZE = 61
TOKENIZER = {
    "kind": "SentencePieceTokenizer",
    "model": "m",
    "chat_template": None,
    "digest": "d" * 16,
    "vocab_size": VOCAB_SIZE,
}
SIDES = ((1, 1), (2, 3), (1, 2), (2, 1), (1, 4), (3, 2), (2, 2))
"""Positives and negatives of group g, repeating."""


def made_group(
    prompt: Sequence[int], *responses: Sequence[int], labels: Sequence[int], values=None, masks=None, row: int = 1
) -> PreparedGroup:
    size = len(responses)
    return PreparedGroup(
        prompt_tokens=np.array(prompt, dtype=np.int32),
        response_tokens=tuple(np.array(tokens, dtype=np.int32) for tokens in responses),
        response_masks=tuple(masks or [None] * size),
        labels=tuple(labels),
        values=tuple(values or [float("nan")] * size),
        ref_logps=(float("nan"),) * size,
        source_row=row,
    )


def made_groups(count: int, *, seed: int = 0, sides: Sequence[tuple[int, int]] = SIDES) -> list[PreparedGroup]:
    """Two to five responses of 1 to 9 tokens; a token of the second response of every other group is masked."""
    draw = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        positives, negatives = sides[g % len(sides)]
        size = positives + negatives
        labels = draw.permutation([1] * positives + [-1] * negatives).tolist()
        lengths = draw.integers(1, 10, size=size)
        masks: list[np.ndarray | None] = [None] * size
        if g % 2 and lengths[1] > 1:
            masks[1] = np.arange(lengths[1]) != lengths[1] // 2
        groups.append(
            made_group(
                draw.integers(0, VOCAB_SIZE, size=draw.integers(2, 8)).tolist(),
                *(draw.integers(0, VOCAB_SIZE, size=n).tolist() for n in lengths),
                labels=labels,
                values=draw.normal(size=size).round(3).tolist(),
                masks=masks,
                row=10 * g + 1,
            )
        )
    return groups


def write_store(path: Path, groups: Sequence[PreparedGroup], *, source: str | None = None) -> TokenStore:
    """A store of ``groups``, all read from the file ``source``."""
    identity = StoreIdentity(tokenizer=TOKENIZER, options={})
    with whole_folder(path, overwrite=False) as folder, closing(StoreWriter(folder, identity)) as writer:
        for item in groups:
            writer.add(item, 0)
        writer.finish(sources=[{"path": source or f"{path.name}.jsonl", "schema": "canonical"}], counts=[])
    return TokenStore.open(path)


def write_reference(root: Path, store: TokenStore, logps: Sequence[float]) -> None:
    """``logps`` as the reference log-probabilities of all of a store's responses, of no weights in particular."""
    key = ReferenceKey(store_digest=store.digest, weights_digest="of no model", precision="fp32")
    ReferenceWriter(root, store, key).put(np.arange(store.num_responses), np.array(logps))


def num_responses(groups: Sequence[PreparedGroup]) -> int:
    return sum(len(item.labels) for item in groups)


def counted(item: PreparedGroup, response: int) -> np.ndarray:
    """[L] bool: the response's tokens that count."""
    mask = item.response_masks[response]
    return np.ones(len(item.response_tokens[response]), dtype=bool) if mask is None else mask


def made_logps(groups: Sequence[PreparedGroup], *, seed: int = 1, per_token: float = -4.0) -> list[float]:
    """A number for each response of ``groups``, in order, near what an untrained model gives."""
    draw = np.random.default_rng(seed)
    return [
        per_token * int(counted(item, k).sum()) + float(draw.normal())
        for item in groups
        for k in range(len(item.labels))
    ]
