"""Runs on the ranks: the package's own path from groups to gradient and update, on one layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from group_samples import make_samples, reference_logps
from layout_case import MODELS, SEQ_LENGTH, VOCAB_SIZE, LayoutCase

from megatron_groupdpo.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert.tensors.megatron_names import tensor_key
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.mcore.model.init import sharded_tensors
from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.mcore.weights import finish_param_gather, unwrapped
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.train_step import accumulate_gradient


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A piece of a weight (or of its gradient) and where it lies in the whole; layers have names of their own."""

    name: str
    offset: tuple[int, ...]
    whole_shape: tuple[int, ...]
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank saw."""

    weights_before: list[Shard]
    gradient: list[Shard]
    """After the reduction over ranks, before clipping."""
    weights_after: list[Shard]
    grad_norms: list[float]
    losses: list[dict[str, float]]
    """Per step, on ranks with the output layer."""
    logps: list[np.ndarray]
    """[R] per step, on ranks with the output layer."""
    scores: list[np.ndarray]
    coefficients: list[np.ndarray]
    """[R] dL/dlogp, as scores."""
    digest_before: str
    digest_after: str


def run_case(case: LayoutCase) -> RankResult:
    """The steps of a case on this rank, from weights that depend on their names alone."""
    parallel = ParallelConfig(device="cpu", **case.parallel)
    ranks = initialize(parallel, seed=1)
    try:
        return _run_case(case, parallel, ranks)
    finally:
        shut_down()


def _run_case(case: LayoutCase, parallel: ParallelConfig, ranks: Ranks) -> RankResult:
    precision = PrecisionConfig(**{"log_probs_chunk_size": 5, **case.precision})
    policy = build_policy(ModelConfig(**MODELS[case.model]), parallel, precision, ranks, seed=1, training=True)
    set_weights(policy)
    options = OptimizerConfig(**{"lr": 1e-3, "lr_decay_style": "constant", **case.optimizer})
    optimizer = build_optimizer(policy.chunks, options, parallel, precision)
    schedule = build_lr_schedule(optimizer, options, warmup_groups=0, decay_groups=1000)
    updater = Updater(optimizer, schedule)
    source = batch_source(case, parallel, ranks)
    weights_before, digest_before, gradient = collect(policy), policy.weights_digest(), []
    losses, logps, scores, coefficients, grad_norms = [], [], [], [], []
    for step in range(case.num_steps):
        planned = source.batch(step * case.num_groups, case.num_groups)
        given = (planned.batch, planned.ref_logps_R, source.loss)
        if case.coupled:
            accumulate_coupled_gradient(policy.engine, source.microbatches(given[0], whole_groups=True), *given)
            outcome = None
        else:
            outcome = accumulate_gradient(policy.engine, planned.microbatches, *given)
        if step == 0:
            if parallel.use_distributed_optimizer:
                complete_gradients(policy)
            with gradients_in_place_of_weights(policy):
                gradient = collect(policy)
        if outcome is not None:
            result = outcome.result
            losses.append(
                {
                    "loss": float(result.loss),
                    "preference_loss": float(result.preference_loss),
                    "nll_loss": float(result.nll_loss),
                    "drift": -1.0 if outcome.score_drift is None else outcome.score_drift,
                }
            )
            logps.append(outcome.logps_R.numpy().copy())
            scores.append(result.scores_R.numpy().copy())
            coefficients.append(result.weights_R.numpy().copy())
        if case.optimizer:
            grad_norms.append(updater.step(case.num_groups))
    finish_param_gather(policy.chunks)
    return RankResult(
        weights_before=weights_before,
        gradient=gradient,
        weights_after=collect(policy),
        grad_norms=grad_norms,
        losses=losses,
        logps=logps,
        scores=scores,
        coefficients=coefficients,
        digest_before=digest_before,
        digest_after=policy.weights_digest(),
    )


def batch_source(case: LayoutCase, parallel: ParallelConfig, ranks: Ranks) -> BatchSource:
    """The groups of :func:`make_samples` in their order, step after step."""
    samples = make_samples(case.num_groups * case.num_steps)
    packed = case.max_tokens_per_microbatch is not None
    plan = plan_options(
        parallel,
        precision=PrecisionConfig(**case.precision),
        data_parallel_size=ranks.dp_group.size(),
        micro_batch_size=None if packed else case.micro_batch_size,
        max_tokens_per_microbatch=case.max_tokens_per_microbatch,
        seq_length=SEQ_LENGTH,
        attention_cost=0.01,
        pad_token=3,
    )
    return BatchSource(
        samples,  # type: ignore[arg-type]
        range(len(samples)),
        loss=LossOptions(**case.loss_options),
        plan=plan,
        data_parallel_rank=ranks.dp_group.rank(),
        context_parallel_rank=ranks.cp_group.rank(),
        seed=0,
        sampler=GroupSampler(len(samples), seed=0, shuffle=False),
        reference=None if case.reference_free else reference_logps(samples),  # type: ignore[arg-type]
    )


def set_weights(policy: Policy) -> None:
    """Fill every parameter with noise drawn from its name: norms near 1, biases not 0, so that none is idle."""
    for chunk in policy.chunks:
        for shard in sharded_tensors(unwrapped(chunk)):
            name, offset, shape = _place(shard)
            assert shard.data is not None
            window = tuple(slice(start, start + size) for start, size in zip(offset, shard.local_shape))
            with torch.no_grad():
                shard.data.copy_(torch.from_numpy(_draw(name, shape)[window]).reshape(shard.data.shape))


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if _is_vocabulary(name):
        # How many rows pad the vocabulary depends on the layout; a padded row must change nothing, so it is noise too.
        whole = np.full(shape, 7.0)
        whole[:VOCAB_SIZE] = draw.normal(scale=0.6, size=(VOCAB_SIZE, *shape[1:]))
        return whole
    if "norm" in name and name.endswith("weight"):
        return 1.0 + draw.normal(scale=0.2, size=shape)
    return draw.normal(scale=0.2, size=shape)


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def collect(policy: Policy) -> list[Shard]:
    """Copies of this rank's parameters as the distributed checkpoint places them."""
    shards = []
    for chunk in policy.chunks:
        for shard in sharded_tensors(unwrapped(chunk)):
            name, offset, shape = _place(shard)
            assert shard.data is not None
            values = shard.data.detach().float().reshape(shard.local_shape).numpy().copy()
            shards.append(Shard(name=name, offset=offset, whole_shape=shape, values=values))
    return shards


def complete_gradients(policy: Policy) -> None:
    """Under the distributed optimizer each rank has its part of the reduced gradient: bring the parts together."""
    for chunk in policy.chunks:
        for bucket in (bucket for buffer in chunk.buffers + chunk.expert_parallel_buffers for bucket in buffer.buckets):
            group = policy.ranks.replicas_of(bucket.params_list[0])
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


@contextmanager
def gradients_in_place_of_weights(policy: Policy) -> Iterator[None]:
    """Let each parameter's data be its gradient buffer for a while: gradients then have the weights' names."""
    parameters = [parameter for chunk in policy.chunks for parameter in unwrapped(chunk).parameters()]
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad
        yield
    finally:
        for parameter, data in zip(parameters, kept):
            parameter.data = data


def _place(shard: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Name with its layer's and its expert's number, offset in the whole tensor and shape of the whole."""
    axes = shard.prepend_axis_num
    name, layer = tensor_key(shard.key, shard.global_offset[:axes])
    return (
        name if layer is None else f"{name}#{layer}",
        tuple(shard.global_offset[axes:]),
        tuple(shard.global_shape[axes:]),
    )


def whole_tensors(
    parts: Sequence[list[Shard]], *, replicas_agree_to: float = 0.0, vocab_size: int = VOCAB_SIZE
) -> dict[str, torch.Tensor]:
    """Put the shards of all ranks together: name to float64 tensor, without the rows that pad the vocabulary.

    Ranks that hold the same piece (data-parallel replicas, norms under tensor parallelism, tied embeddings of the
    first and the last stage) must agree, relative to the tensor's largest entry.
    """
    whole: dict[str, np.ndarray] = {}
    for shard in (shard for part in parts for shard in part):
        tensor = whole.setdefault(shard.name, np.full(shard.whole_shape, np.nan))
        window = tuple(slice(start, start + size) for start, size in zip(shard.offset, shard.values.shape))
        known = tensor[window]
        if not np.isnan(known).all():
            gap = np.abs(known - shard.values).max()
            assert gap <= replicas_agree_to * np.abs(known).max(), f"copies of {shard.name} differ by {gap}"
        tensor[window] = shard.values
    tensors = {
        name: torch.from_numpy(tensor[:vocab_size] if _is_vocabulary(name) else tensor)
        for name, tensor in whole.items()
    }
    missing = [name for name, tensor in tensors.items() if bool(tensor.isnan().any())]
    assert not missing, f"pieces held by no rank: {missing}"
    return tensors
