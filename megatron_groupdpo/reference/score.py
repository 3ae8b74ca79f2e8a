"""Scoring a token store with a model, once, on any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupdpo.config.fp8 import precision_name
from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import PlanOptions, plan_batch
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.errors import DataError, UserError
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.reference.content import HASH_WORDS, group_hashes
from megatron_groupdpo.reference.store import ReferenceKey, ReferenceWriter
from megatron_groupdpo.types import GroupBatch, GroupSample

_GROUPS_TO_HASH = 4096
"""Groups between two exchanges of hashes, on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What :func:`score_store` did; counts of responses."""

    num_scored: int
    """Run through the model."""
    num_taken_over: int
    """Taken from other stores that the same weights had scored."""


def score_store(
    policy: Policy,
    store: TokenStore,
    root: Path,
    *,
    plan: PlanOptions,
    groups_per_batch: int,
    on_groups: Callable[[int], None] = lambda count: None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_hashed: Callable[[int], None] = lambda count: None,
) -> Scored:
    """Write the summed log-probability of every response of ``store`` that has none yet.

    A response whose content the same weights have scored in another store under ``root`` takes over that number, bit
    for bit. Only the other responses are run. A response's number may differ in rounding with those it shares a
    microbatch with, so a store scored in two steps equals one scored at once to rounding, and to the bit where the
    microbatches are the same.

    Args:
        policy: the reference model, on whatever layout; every rank makes the same call.
        store: what to score.
        root: the reference folder; see :mod:`megatron_groupdpo.reference.store`.
        plan: microbatches.
        groups_per_batch: groups of one schedule call; what a kill loses at most.
        on_groups: called with the number of groups just written, on the logging rank.
        on_start: called with the groups that need no pass and the groups of the store, on the logging rank.
        on_hashed: called with the number of groups just hashed to find their numbers, on the logging rank.

    Raises:
        DataError: the folder holds numbers of other weights or another precision.
        UserError: a log-probability is not finite.
    """
    _check_fit(policy, store)
    key = ReferenceKey(
        store_digest=store.digest,
        weights_digest=policy.weights_digest(),
        precision=precision_name(policy.precision),
    )
    writer, missing_R, num_taken_over = _open(policy.ranks, store, root, key, on_hashed)
    lacks_G = np.logical_or.reduceat(missing_R, store.first_response_G1[:-1]) if len(store) else np.empty(0, dtype=bool)
    missing_G = np.flatnonzero(lacks_G)
    if writer is not None:
        on_start(len(store) - len(missing_G), len(store))
    for start in range(0, len(missing_G), groups_per_batch):
        ids = missing_G[start : start + groups_per_batch]
        batch, logps_R = score_groups(policy, [store[int(group_id)] for group_id in ids], plan, only=missing_R)
        bad = torch.zeros((), dtype=torch.int64, device=policy.ranks.device)
        if logps_R is not None:
            bad += (~torch.isfinite(logps_R)).sum()
        if int(policy.ranks.broadcast_from_last_stage(bad)):
            raise UserError(
                f"{int(bad)} log-probabilities of groups {int(ids[0])} to {int(ids[-1])} of {store.path} are not "
                "finite; the checkpoint is broken, or its precision is too low for it"
            )
        if writer is not None:
            assert logps_R is not None
            writer.put(batch.response_ids_R.numpy(), logps_R.cpu().numpy())
            on_groups(len(ids))
    return Scored(num_scored=int(missing_R.sum()), num_taken_over=num_taken_over)


def score_groups(
    policy: Policy, samples: Sequence[GroupSample], plan: PlanOptions, *, only: np.ndarray | None = None
) -> tuple[GroupBatch, torch.Tensor | None]:
    """Summed log-probabilities [R] float64 of the groups' responses, on ranks that hold the output layer.

    Args:
        policy: every rank makes the same call.
        samples: groups; responses are numbered by their ``first_response_id``.
        plan: microbatches.
        only: bool by response id, False for those that get no pass.
    """

    def needs_pass(given: dict[str, torch.Tensor]) -> torch.Tensor:
        passes_GK = given["labels_GK"] != 0
        if only is not None:
            for g, sample in enumerate(samples):
                size = len(sample.response_tokens)
                asked_K = only[sample.first_response_id : sample.first_response_id + size]
                passes_GK[g, :size] &= torch.from_numpy(np.array(asked_K))
        return passes_GK

    batch = build_batch(samples, group_keys_G=torch.zeros(len(samples), dtype=torch.int64), needs_pass=needs_pass)
    microbatches = build_microbatches(
        plan_batch(batch, plan),
        plan,
        rank=policy.ranks.dp_group.rank(),
        context_rank=policy.ranks.cp_group.rank(),
    )
    return batch, policy.engine.score(microbatches, batch.num_responses)


def _check_fit(policy: Policy, store: TokenStore) -> None:
    longest, positions = int(store.meta["max_row_tokens"]), policy.model.max_position_embeddings
    if longest > positions:
        raise DataError(
            f"{store.path}: the longest prompt and response have {longest} tokens, the model {positions} positions; "
            f"run tools/preprocess_data.py with --seq-length {positions}"
        )
    tokens, vocabulary = int(store.meta["tokenizer"]["vocab_size"]), policy.model.vocab_size
    if vocabulary is not None and tokens > vocabulary:
        raise DataError(
            f"{store.path}: its tokenizer has {tokens} tokens, the model's vocabulary {vocabulary}; use the model's own"
        )


def _open(
    ranks: Ranks, store: TokenStore, root: Path, key: ReferenceKey, on_hashed: Callable[[int], None]
) -> tuple[ReferenceWriter | None, np.ndarray, int]:
    """The writer on the logging rank; on every rank, which responses lack a number (bool [R]), how many took one over.

    Raises:
        DataError: the folder holds numbers of another key.
    """
    writer = None
    answer: list[Any] = [None]
    if ranks.is_logger:
        try:
            writer = ReferenceWriter(root, store, key)
            answer[0] = len(writer.missing()) > 0 and not writer.knows_content
        except UserError as error:
            answer[0] = error  # every rank must stop with it
    _from_logger(ranks, answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    if answer[0]:
        blocks = _hash_blocks(ranks, store, on_hashed)
        if writer is not None:
            writer.write_content(blocks)
        else:
            for _ in blocks:  # each is exchanged by all ranks
                pass
    if writer is not None:
        num_taken_over = writer.take_over() if len(writer.missing()) else 0
        missing_R = np.zeros(store.num_responses, dtype=bool)
        missing_R[writer.missing()] = True
        answer = [num_taken_over, np.packbits(missing_R)]
    else:
        answer = [None, None]
    _from_logger(ranks, answer)
    num_taken_over, bits = answer
    return writer, np.unpackbits(bits, count=store.num_responses).astype(bool), num_taken_over


def _hash_blocks(ranks: Ranks, store: TokenStore, on_hashed: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Hashes [n, 2] uint64 of all responses in order, a block of groups at a time, each made by all ranks together."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for start in range(0, len(store), _GROUPS_TO_HASH * world):
        stop = min(start + _GROUPS_TO_HASH * world, len(store))
        own_start, own_stop = (start + (stop - start) * part // world for part in (rank, rank + 1))
        first, own_first, own_end, end = (
            int(store.first_response_G1[group_id]) for group_id in (start, own_start, own_stop, stop)
        )
        block = torch.zeros((end - first, HASH_WORDS), dtype=torch.int64)
        block[own_first - first : own_end - first] = torch.from_numpy(
            group_hashes(store, own_start, own_stop).view(np.int64)
        )
        block = block.to(ranks.device)
        dist.all_reduce(block)
        if ranks.is_logger:
            on_hashed(stop - start)
        yield block.cpu().numpy().view(np.uint64)


def _from_logger(ranks: Ranks, answer: list[Any]) -> None:
    logger = torch.tensor(dist.get_rank() if ranks.is_logger else 0, device=ranks.device)
    dist.all_reduce(logger)
    dist.broadcast_object_list(answer, src=int(logger), device=ranks.device)
