"""Runs on ranks that came through ``te_runtime.call``: weights kept in FP8."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fused_layers import sized
from megatron.core.fp8_utils import is_float8tensor
from te_patches import UNFUSED, gathered_bucket_by_bucket, layers_allowed_on_a_cpu
from two_pass_case import Case, Runner, one_rank

from megatron_groupdpo.convert.hf.folder import is_hf_folder
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.weights.loading import load_hf_weights
from megatron_groupdpo.mcore.checkpoint.digest import differing_replicas, parameter_names
from megatron_groupdpo.mcore.checkpoint.folders import Progress
from megatron_groupdpo.mcore.checkpoint.training import load_weights, save_checkpoint
from megatron_groupdpo.mcore.fp8.weights import raw_parts, reload_masters
from megatron_groupdpo.reference.swapped import swapped_reference


def fp8_steps(
    precision: Mapping[str, Any],
    family: str | None,
    parallel: Mapping[str, Any],
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """Three steps, by weights of ``load`` where given: log-probabilities, digests, what is held of the weights."""
    parallel = {"use_distributed_optimizer": True} | dict(parallel)
    layers = 4 if "pipeline_model_parallel_size" in parallel else 2
    model = {"num_layers": layers} if family is None else sized(family, small=True)
    if load is not None and is_hf_folder(Path(load)):
        model = dataclasses.asdict(open_hf_model(Path(load)).model)
        del model["transformer_impl"]
    case = Case(
        model=model,
        precision=UNFUSED | dict(precision),
        packed=family is not None,
        parallel=parallel,
        clip_grad=0.0,  # the norm is summed buffer by buffer, and FP8 weights have one of their own
    )
    with layers_allowed_on_a_cpu(), gathered_bucket_by_bucket(), one_rank("cpu", **parallel) as ranks:
        runner = Runner(case, ranks)
        result = _steps_of(runner, load)
        if save is not None:
            policy = runner.policy
            save_checkpoint(Path(save), policy.chunks, progress=Progress(), model=policy.identity, config={})
        return result


def _steps_of(runner: Runner, load: str | None) -> dict[str, Any]:
    policy, updater = runner.policy, runner.updater
    found: dict[str, Any] = {"initial": policy.weights_digest()}
    if load is not None:
        if is_hf_folder(Path(load)):
            load_hf_weights(Path(load), policy)
        else:
            load_weights(Path(load) / "iter_0000000", policy.chunks, model=policy.identity)
        reload_masters(policy.chunks, updater.optimizer)
        found["loaded"] = policy.weights_digest()
    found["steps"] = []
    for _ in range(3):
        runner.engine.calibrate(runner.passes_of_this_stage)
        with runner.engine.step():
            outcome = runner.passes_of_this_stage()
        assert updater.step(runner.batch.num_groups) > 0
        scored_R = policy.engine.score(runner.microbatches, runner.batch.num_responses)
        if outcome is not None and scored_R is not None:  # the last stage
            found["steps"].append((outcome.logps_R.tolist(), outcome.score_drift, scored_R.tolist()))
    found |= {
        "digest": policy.weights_digest(),
        "parameters": policy.num_parameters(),
        "replicas": differing_replicas(policy.chunks, policy.ranks),
        "names": sorted(parameter_names(policy.chunks[0])),
    }
    assert bool(found["steps"]) == policy.ranks.is_last_stage
    weights = [p for chunk in policy.chunks for p in chunk.parameters()]
    quantized = [p for p in weights if is_float8tensor(p)]
    whole = sum(p.numel() * 2 for p in weights)
    held = sum(part.numel() * part.element_size() for p in weights for part in raw_parts(p))
    return {"same": found, "quantized": len(quantized), "bytes": held / whole}


def altered_replicas(precision: Mapping[str, Any]) -> list[str | None]:
    """What is said of two replicas whose weights are equal; differ in a byte; differ in a scale."""
    parallel = {"use_distributed_optimizer": True}
    case = Case(model={}, precision=UNFUSED | dict(precision), parallel=parallel)
    with layers_allowed_on_a_cpu(), one_rank("cpu", **parallel) as ranks:
        policy = Runner(case, ranks).policy
        weight = next(p for p in policy.chunks[0].parameters() if is_float8tensor(p))
        found = [differing_replicas(policy.chunks, ranks)]
        for part in raw_parts(weight):
            changed = part.view(-1).view(torch.uint8)
            changed[-1] ^= ranks.dp_group.rank()
            found.append(differing_replicas(policy.chunks, ranks))
            changed[-1] ^= ranks.dp_group.rank()
        return found


def swapped_steps(precision: Mapping[str, Any]) -> dict[str, Any]:
    """A reference that takes the policy's place, after steps that took the policy elsewhere."""
    parallel = {"use_distributed_optimizer": True}
    case = Case(model={}, precision=UNFUSED | dict(precision), parallel=parallel, clip_grad=0.0)
    with layers_allowed_on_a_cpu(), gathered_bucket_by_bucket(), one_rank("cpu", **parallel) as ranks:
        runner = Runner(case, ranks)
        reference = swapped_reference(runner.policy)
        found: dict[str, Any] = {"initial": runner.policy.weights_digest(), "reference": reference.weights_digest()}
        scores = []
        for _ in range(2):
            runner.step()
            runner.updater.step(runner.batch.num_groups)
            own = found["digest"] = runner.policy.weights_digest()
            for engine in (runner.engine, reference.engine, runner.engine):
                logps_R = engine.score(runner.microbatches, runner.batch.num_responses)
                assert logps_R is not None
                scores.append(logps_R.tolist())
            assert runner.policy.weights_digest() == own
        return found | {"scores": scores}
