"""What a layout's options leave on each rank, in numbers. That they change no result is the layout matrix's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from rank_pool import RankPool

SIZES: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 32, "kv_channels": 4,
    "vocab_size": 32, "make_vocab_size_divisible_by": 8, "max_position_embeddings": 32, "add_bias_linear": False,
    "normalization": "RMSNorm", "position_embedding_type": "rope", "num_query_groups": 4,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 8}
VOCABULARY, LAYER = 32 * 16, 4 * 16 * 16 + 2 * 16 * 32
"""Matrices of the tied embedding and of a layer: attention's four, and the MLP's two."""
NORMS = 2 * 16


def numbers_on_rank(parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Sizes of what this rank holds, before and after one update."""
    import torch
    import torch.distributed as dist

    from megatron_groupdpo.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
    from megatron_groupdpo.data.batches.planner import plan_options
    from megatron_groupdpo.mcore.passes.optimizer import build_optimizer
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.mcore.weights import optimizer_parts, unwrapped

    given = ParallelConfig(device="cpu", **parallel)
    ranks = initialize(given, seed=1)
    try:
        policy = build_policy(ModelConfig(**SIZES | model), given, PrecisionConfig(), ranks, seed=1, training=True)
        optimizer = build_optimizer(policy.chunks, OptimizerConfig(lr=0.1), given, PrecisionConfig())
        models = [unwrapped(chunk) for chunk in policy.chunks]
        parameters = [parameter for model in models for parameter in model.parameters()]
        before = torch.cat([parameter.detach().flatten().clone() for parameter in parameters])
        for parameter in parameters:
            parameter.main_grad.fill_(1.0)
        optimizer.step()
        after = torch.cat([parameter.detach().flatten() for parameter in parameters])
        state = [part.optimizer.state for part in optimizer_parts(optimizer)]
        norm = next(module for module in models[-1].modules() if type(module).__name__.endswith("RMSNorm"))
        return {
            "matrices": sum(parameter.numel() for parameter in parameters if parameter.ndim > 1),
            "chunks": len(models),
            "stages": [len(model.decoder.layers) for model in models],
            "experts": sum(type(module).__name__ == "MLP" for model in models for module in model.modules()),
            "row multiple": plan_options(given, data_parallel_size=1, micro_batch_size=1).row_multiple,
            "context": ranks.cp_group.size(),
            "moments": sum(entry["exp_avg"].numel() for part in state for entry in part.values()) / before.numel(),
            "moved": float((before != after).float().mean()),
            "buckets": sum(len(buffer.buckets) for chunk in policy.chunks for buffer in chunk.buffers),
            "split norms": bool(getattr(norm.weight, "sequence_parallel", False)),
            "timeout": dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout,  # type: ignore[union-attr]
        }
    finally:
        shut_down()


TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "ddp_bucket_size": 1000}
WHOLE = VOCABULARY + 4 * LAYER
# layout, model, and what each of two ranks must have
HELD: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "data parallel": ({}, {}, {"matrices": WHOLE, "chunks": 1, "moments": 1.0, "moved": 1.0, "buckets": 1}),
    "tensor": (TP2, {}, {"matrices": WHOLE // 2, "split norms": False}),
    "sequence": (TP2 | {"sequence_parallel": True}, {}, {"matrices": WHOLE // 2, "split norms": True}),
    "pipeline": (PP2, {}, {"matrices": VOCABULARY + 2 * LAYER, "stages": [2]}),
    "virtual": (PP2 | {"virtual_pipeline_model_parallel_size": 2}, {}, {"chunks": 2, "stages": [1, 1]}),
    "context": ({"context_parallel_size": 2}, {}, {"matrices": WHOLE, "row multiple": 4, "context": 2}),
    "experts": ({"expert_model_parallel_size": 2}, MIXTURE, {"experts": 4 * 2}),
    "experts, whole": ({}, MIXTURE, {"experts": 4 * 4}),
    "sharded": (SHARDED, {}, {"moments": 0.5, "moved": 1.0}),
    "gathered late": (SHARDED | OVERLAP | {"overlap_param_gather": True}, {}, {"moments": 0.5, "moved": 0.5}),
    # From the last parameter on, a bucket is closed at 1000: two in each layer, and the embedding's.
    "overlap": (OVERLAP, {}, {"moments": 1.0, "buckets": 2 * 4 + 1}),
    "time": ({"distributed_timeout_minutes": 3}, {}, {"timeout": timedelta(minutes=3)}),
}


@pytest.mark.acts(
    "ParallelConfig.tensor_model_parallel_size",
    "ParallelConfig.pipeline_model_parallel_size",
    "ParallelConfig.virtual_pipeline_model_parallel_size",
    "ParallelConfig.context_parallel_size",
    "ParallelConfig.expert_model_parallel_size",
    "ParallelConfig.sequence_parallel",
    "ParallelConfig.use_distributed_optimizer",
    "ParallelConfig.overlap_grad_reduce",
    "ParallelConfig.overlap_param_gather",
    "ParallelConfig.ddp_bucket_size",
    "ParallelConfig.distributed_timeout_minutes",
)
@pytest.mark.parametrize(("parallel", "model", "wanted"), HELD.values(), ids=HELD)
def test_a_rank_holds_its_part(pool: RankPool, parallel: dict[str, Any], model: dict[str, Any], wanted: dict[str, Any]):
    for numbers in pool.run(2, numbers_on_rank, parallel, model):
        for name, value in wanted.items():
            # Buffers are padded so that they can be cut.
            assert numbers[name] == (pytest.approx(value, rel=0.05) if isinstance(value, float) else value), name
