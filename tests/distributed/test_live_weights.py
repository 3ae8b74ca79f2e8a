"""Whoever reads live weights reads those of the last update, wherever an option keeps them meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_case import MODELS, LayoutCase
from rank_pool import RankPool
from test_overlap import LATE

READERS = ("export", "digest", "replicas", "swapped reference", "checkpoint", "sampling", "evaluation")


def read_after_an_update(parallel: dict[str, Any], folder: str, reader: str) -> list[str]:
    """What a reader finds straight after an update that is not so once all ranks have the weights for sure."""
    import torch
    from layout_run import batch_source, collect, set_weights, whole_tensors

    from megatron_groupdpo.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
    from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.mcore.weights import finish_param_gather
    from megatron_groupdpo.step.train_step import accumulate_gradient

    options = ParallelConfig(device="cpu", **parallel)
    ranks = initialize(options, seed=1)
    try:
        precision = PrecisionConfig(log_probs_chunk_size=5)
        policy = build_policy(ModelConfig(**MODELS["llama-untied"]), options, precision, ranks, seed=1, training=True)
        set_weights(policy)
        learning = OptimizerConfig(lr=0.05, lr_decay_style="constant")
        optimizer = build_optimizer(policy.chunks, learning, options, precision)
        updater = Updater(optimizer, build_lr_schedule(optimizer, learning, warmup_groups=0, decay_groups=1000))
        case = LayoutCase(num_ranks=2, parallel=parallel)
        source = batch_source(case, options, ranks)
        planned = source.batch(0, case.num_groups)
        accumulate_gradient(policy.engine, planned.microbatches, planned.batch, planned.ref_logps_R, source.loss)
        before = {shard.name: shard.values for shard in collect(policy)}
        updater.step(case.num_groups)
        late = _read(reader, policy, planned, Path(folder) / "late")
        finish_param_gather(policy.chunks)
        moved = [float(abs(shard.values - before[shard.name]).max()) for shard in collect(policy)]
        assert min(moved) > 0, "an update that leaves a weight alone shows nothing"
        if not isinstance(late, dict):
            settled = _read(reader, policy, planned, Path(folder) / "settled")
            return [] if late == settled else [f"{late}, and then {settled}"]
        weights = whole_tensors([collect(policy)])
        assert late.keys() == (weights.keys() if late else set()), "a reader that left tensors out"
        return [name for name, tensor in late.items() if not torch.equal(tensor, weights[name].float())]
    finally:
        shut_down()


def _read(reader: str, policy: Any, planned: Any, folder: Path) -> Any:
    import numpy as np
    import torch.distributed as dist
    from layout_run import collect, whole_tensors

    from megatron_groupdpo.convert.families import family_named
    from megatron_groupdpo.convert.tensors.plan import conversion_plan
    from megatron_groupdpo.convert.weights.whole_tensors import checkpoint_tensors, gathered_tensors
    from megatron_groupdpo.mcore.checkpoint.digest import differing_replicas
    from megatron_groupdpo.mcore.checkpoint.folders import Progress
    from megatron_groupdpo.mcore.checkpoint.training import save_checkpoint
    from megatron_groupdpo.mcore.generate import SamplingOptions, sample
    from megatron_groupdpo.reference.swapped import SwappedWeights

    plan = conversion_plan(family_named("llama"), policy.model)
    if reader == "export":
        found = [(key, None if tensor is None else tensor.clone()) for key, tensor in gathered_tensors(policy, plan)]
        return {_shown(key): tensor for key, tensor in found} if dist.get_rank() == 0 else {}  # rank 0 writes
    if reader == "checkpoint":
        save_checkpoint(folder, policy.chunks, progress=Progress(), model=policy.identity, config={})
        return {_shown(key): tensor for key, tensor in checkpoint_tensors(folder / "iter_0000000", plan)}
    if reader == "swapped reference":
        copies = SwappedWeights(policy.chunks, policy.ranks.device)
        copies.exchange()
        held = {name: weight.float() for name, weight in whole_tensors([collect(policy)]).items()}
        copies.exchange()
        return held
    if reader == "digest":
        return policy.weights_digest()
    if reader == "replicas":
        return differing_replicas(policy.chunks, policy.ranks)
    if reader == "sampling":
        prompts = [np.array([3, 5, 7]), np.array([11, 2])] * 8
        options = SamplingOptions(max_new_tokens=8, temperature=1.0)
        return [r.tokens.tolist() for r in sample(policy, prompts, range(len(prompts)), options, end_token=60)]
    assert reader == "evaluation"
    return policy.engine.score(planned.microbatches, planned.batch.num_responses).tolist()


def _shown(key: tuple[str, int | None]) -> str:
    """As ``collect`` names the tensor."""
    name, layer = key
    return name if layer is None else f"{name}#{layer}"


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_waits_for_weights_that_are_gathered_late(pool: RankPool, tmp_path: Path, reader: str):
    assert pool.run(2, read_after_an_update, LATE, str(tmp_path), reader) == [[], []]
