"""Policies on one GPU with weights that depend on their names alone, for the tests of this folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.run.batches import BatchSource, PlannedBatch, on_device
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.types import GroupSample

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
PARALLEL = ParallelConfig(device="cuda")
LOSS = LossOptions(
    objective="all_pairs",
    beta=0.5,
    score_average=True,
    nll_coeff=0.3,
    nll_average="response",
    one_sided_nll=False,
)


@contextmanager
def one_gpu() -> Iterator[Ranks]:
    ranks = initialize(PARALLEL, seed=1)
    try:
        yield ranks
    finally:
        shut_down()


def make_policy(ranks: Ranks, *, impl: str = "local", **precision: Any) -> Policy:
    """Weights of bf16 in every precision, so that only the computation differs."""
    model = ModelConfig(**MODEL, transformer_impl=impl)  # type: ignore[arg-type]
    policy = build_policy(model, PARALLEL, PrecisionConfig(**precision), ranks, seed=1, training=True)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.copy_(parameter.bfloat16())
    return policy


def planned_batch(ranks: Ranks, **plan: Any) -> PlannedBatch:
    """Four groups of five ragged responses, on the GPU."""
    draw = np.random.default_rng(0)
    size = 5
    samples = [
        GroupSample(
            group_id=group,
            first_response_id=group * size,
            prompt_tokens=draw.integers(0, 1000, size=20 + group, dtype=np.int32),
            response_tokens=tuple(
                draw.integers(0, 1000, size=draw.integers(8, 90), dtype=np.int32) for _ in range(size)
            ),
            response_masks=(None,) * size,
            labels_K=np.array([1, 1, -1, -1, -1], dtype=np.int8),
            values_K=draw.normal(size=size).astype(np.float32),
        )
        for group in range(4)
    ]
    source = BatchSource(
        samples,  # type: ignore[arg-type]
        range(4),
        loss=LOSS,
        plan=plan_options(PARALLEL, data_parallel_size=1, **plan),
        data_parallel_rank=0,
        seed=0,
        sampler=GroupSampler(4, seed=0, shuffle=False),
        reference=None,
    )
    return on_device(source.batch(0, 4), ranks.device)


def reference_of(planned: PlannedBatch) -> torch.Tensor:
    """[R] float64: log-probabilities near those of a random model, different for each response."""
    noise_R = torch.from_numpy(np.random.default_rng(zlib.crc32(b"reference")).normal(size=planned.batch.num_responses))
    return -6.9 * planned.batch.num_tokens_R.double() + 2.0 * noise_R


def gradient_of(policy: Policy) -> dict[str, torch.Tensor]:
    """By parameter, float64; a fused norm's weight under the name it has on its own."""
    module: Any = policy.chunks[0].module
    while hasattr(module, "module"):
        module = module.module
    renamed = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    found = {}
    for name, parameter in module.named_parameters():
        for fused, own in renamed.items():
            name = name.replace(fused, own)
        found[name] = parameter.main_grad.detach().double().clone()
    return found


def gap(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """||found - wanted|| / ||wanted||."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name] - values).square().sum()) for name, values in wanted.items())
    return (difference / sum(float(values.square().sum()) for values in wanted.values())) ** 0.5
