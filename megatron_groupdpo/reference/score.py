"""Scoring a token store with a model, once, on any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupdpo.data.batch import build_batch
from megatron_groupdpo.data.microbatches import build_microbatches
from megatron_groupdpo.data.planner import PlanOptions, plan_batch
from megatron_groupdpo.data.store import TokenStore
from megatron_groupdpo.errors import DataError, UserError
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.reference.store import ReferenceKey, ReferenceWriter


def score_store(
    policy: Policy,
    store: TokenStore,
    root: Path,
    *,
    plan: PlanOptions,
    groups_per_batch: int,
    on_groups: Callable[[int], None] = lambda count: None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the summed log-probability of every response of ``store`` that has none yet; how many were written.

    Args:
        policy: the reference model, on whatever layout; every rank makes the same call.
        store: what to score.
        root: the reference folder; see :mod:`megatron_groupdpo.reference.store`.
        plan: microbatches.
        groups_per_batch: groups of one schedule call; what a kill loses at most.
        on_groups: called with the number of groups just written, on the logging rank.
        on_start: called with the groups done by an earlier run and the groups of the store, on the logging rank.

    Raises:
        DataError: the folder holds numbers of other weights or another precision.
        UserError: a log-probability is not finite.
    """
    _check_fit(policy, store)
    key = ReferenceKey(
        store_digest=store.digest,
        weights_digest=policy.weights_digest(),
        precision="bf16" if policy.config.bf16 else "fp32",
    )
    writer, missing_G = _open(policy.ranks, store, root, key)
    if writer is not None:
        on_start(len(store) - len(missing_G), len(store))
    written = 0
    for start in range(0, len(missing_G), groups_per_batch):
        ids = missing_G[start : start + groups_per_batch]
        samples = [store[int(group_id)] for group_id in ids]
        batch = build_batch(
            samples,
            group_keys_G=torch.zeros(len(samples), dtype=torch.int64),
            needs_pass=lambda given: given["labels_GK"] != 0,
        )
        microbatches = build_microbatches(
            plan_batch(batch, plan),
            plan,
            rank=policy.ranks.dp_group.rank(),
            context_rank=policy.ranks.cp_group.rank(),
        )
        logps_R = policy.engine.score(microbatches, batch.num_responses)
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
        written += batch.num_responses
    return written


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


def _open(ranks: Ranks, store: TokenStore, root: Path, key: ReferenceKey) -> tuple[ReferenceWriter | None, np.ndarray]:
    """The writer on the logging rank, and on every rank the groups that still lack a number."""
    writer = None
    answer: list[Any] = [None]
    if ranks.is_logger:
        try:
            writer = ReferenceWriter(root, store, key)
            missing_R = writer.missing()
            answer[0] = np.unique(np.searchsorted(store.first_response_G1, missing_R, side="right") - 1)
        except UserError as error:
            answer[0] = error  # every rank must stop with it
    _from_logger(ranks, answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    assert answer[0] is not None
    return writer, answer[0]


def _from_logger(ranks: Ranks, answer: list[Any]) -> None:
    logger = torch.tensor(dist.get_rank() if ranks.is_logger else 0, device=ranks.device)
    dist.all_reduce(logger)
    dist.broadcast_object_list(answer, src=int(logger), device=ranks.device)
