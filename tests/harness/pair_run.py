"""Runs on the ranks: this package's numbers for the problem of ``pair_problem.py``, from Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from layout_run import Shard, collect, gradients_in_place_of_weights, whole_tensors
from pair_compare import Numbers
from pair_problem import LOSS, ProblemFiles

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.weights.loading import load_hf_weights
from megatron_groupdpo.data.batches.planner import PlanOptions
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.reference.score import score_store
from megatron_groupdpo.reference.store import ReferenceLogProbs
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.run.logs.metrics import batch_metrics
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.step.train_step import StepResult, accumulate_gradient
from megatron_groupdpo.types import GroupBatch, GroupSample

PRECISION = PrecisionConfig(log_probs_chunk_size=5)


@dataclass(frozen=True, kw_only=True)
class PairJob:
    """One model on one layout under several losses."""

    files: ProblemFiles
    model: str
    losses: tuple[Mapping[str, Any], ...]
    """Loss options that differ from :data:`pair_problem.LOSS`."""
    layout: str = "one rank"
    parallel: Mapping[str, Any] = field(default_factory=dict)
    without_reference: bool = False
    uncounted_token: bool = False
    """Leave the last token of the first pair's chosen response out of the loss."""


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """One loss on one rank."""

    gradient: list[Shard]
    numbers: Numbers | None
    """Without the gradient; None on ranks without the output layer."""
    metrics: Mapping[str, float]
    """As a run logs them."""


def run_pairs(job: PairJob) -> list[PairResult]:
    """A result per loss: Hugging Face weights in, reference scored into its store, one batch of all pairs."""
    parallel = ParallelConfig(device="cpu", **job.parallel)
    ranks = initialize(parallel, seed=1)
    try:
        store = TokenStore.open(job.files.store)
        plan = PlanOptions(
            micro_batch_size=3,
            data_parallel_size=ranks.dp_group.size(),
            length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
            same_length=parallel.pipeline_model_parallel_size > 1,
        )
        reference = None if job.without_reference else _scored(job, store, parallel, ranks, plan)
        return [_one_loss(job, loss, store, reference, parallel, ranks, plan) for loss in job.losses]
    finally:
        shut_down()


def _loaded(folder: Path, parallel: ParallelConfig, ranks: Ranks, *, training: bool) -> Policy:
    policy = build_policy(open_hf_model(folder).model, parallel, PRECISION, ranks, seed=0, training=training)
    load_hf_weights(folder, policy)
    return policy


def _scored(
    job: PairJob, store: TokenStore, parallel: ParallelConfig, ranks: Ranks, plan: PlanOptions
) -> ReferenceLogProbs:
    """Log-probabilities of the reference, computed on this layout and read back from disk."""
    folder = job.files.root / "reference-logps" / f"{job.model} on {job.layout}"
    reference = _loaded(job.files.model(job.model, reference=True), parallel, ranks, training=False)
    score_store(reference, store, folder, plan=plan, groups_per_batch=4)
    dist.barrier()
    return ReferenceLogProbs.open(folder, [store], precision="fp32")


class _UncountedToken:
    """The store with one token of the first group's positive left out of the loss."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __getitem__(self, index: int) -> GroupSample:
        sample = self.store[index]
        if index != 0:
            return sample
        positive = int(np.flatnonzero(sample.labels_K == 1)[0])
        mask = np.arange(len(sample.response_tokens[positive])) < len(sample.response_tokens[positive]) - 1
        masks = [mask if k == positive else None for k in range(len(sample.labels_K))]
        return replace(sample, response_masks=tuple(masks))


def _one_loss(
    job: PairJob,
    loss: Mapping[str, Any],
    store: TokenStore,
    reference: ReferenceLogProbs | None,
    parallel: ParallelConfig,
    ranks: Ranks,
    plan: PlanOptions,
) -> PairResult:
    policy = _loaded(job.files.model(job.model, reference=False), parallel, ranks, training=True)
    source = BatchSource(
        _UncountedToken(store) if job.uncounted_token else store,  # type: ignore[arg-type]
        range(len(store)),
        loss=LossOptions(**{**LOSS, **loss}),
        plan=plan,
        data_parallel_rank=ranks.dp_group.rank(),
        seed=0,
        sampler=GroupSampler(len(store), seed=0, shuffle=False),
        reference=reference,
    )
    planned = source.batch(0, len(store))
    outcome = accumulate_gradient(policy.engine, planned.microbatches, planned.batch, planned.ref_logps_R, source.loss)
    with gradients_in_place_of_weights(policy):
        gradient = collect(policy)
    if outcome is None:
        return PairResult(gradient=gradient, numbers=None, metrics={})
    metrics = batch_metrics(planned.batch, outcome.result, outcome.logps_R, outcome.ref_logps_R, source.loss)
    return PairResult(gradient=gradient, numbers=_numbers(planned.batch, outcome, source.loss), metrics=metrics)


def _numbers(batch: GroupBatch, outcome: StepResult, loss: LossOptions) -> Numbers:
    """By pair. A score averaged over tokens is multiplied by their number, to be the reward that TRL logs."""
    tokens_R = batch.num_tokens_R if loss.score_average else torch.ones_like(batch.num_tokens_R)
    rewards_R = outcome.result.scores_R * tokens_R
    return Numbers(
        loss=float(outcome.result.loss),
        chosen_logps=_side(batch, outcome.logps_R, 1),
        rejected_logps=_side(batch, outcome.logps_R, -1),
        chosen_rewards=_side(batch, rewards_R, 1),
        rejected_rewards=_side(batch, rewards_R, -1),
    )


def _side(batch: GroupBatch, values_R: torch.Tensor, label: int) -> list[float]:
    """Of the one response with that label in each group."""
    return batch.to_groups(values_R)[batch.labels_GK == label].tolist()


def hugging_face_gradient(job: PairJob, shards: Sequence[list[Shard]]) -> dict[str, torch.Tensor]:
    """The shards of all ranks, put together and split into the tensors that the Hugging Face model has."""
    whole = whole_tensors(shards, replicas_agree_to=1e-6)
    gradient: dict[str, torch.Tensor] = {}
    for (name, layer), pair in open_hf_model(job.files.model(job.model, reference=False)).plan.items():
        gradient |= pair.split(whole.pop(name if layer is None else f"{name}#{layer}"))
    assert not whole, f"no Hugging Face tensor has the gradient of {list(whole)}"
    return gradient


def numbers_of(job: PairJob, results: Sequence[PairResult]) -> Numbers:
    """One loss from the results of all ranks; ranks with the output layer must agree."""
    seen = [result.numbers for result in results if result.numbers is not None]
    assert seen, "no rank reports a loss"
    assert all(numbers.loss == seen[0].loss for numbers in seen)
    return replace(seen[0], gradient=hugging_face_gradient(job, [result.gradient for result in results]))
