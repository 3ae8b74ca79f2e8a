"""Floating-point operations a step needs, counted from the shapes."""

from __future__ import annotations

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.types import GroupBatch


def attention_cost(model: ModelConfig) -> float:
    """FLOPs of attention per token and position of sequence length, relative to those of the layers' matrices."""
    per_token, attention = _layer_flops(model)
    return attention / per_token


def _layer_flops(model: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs of all layers: (per token, per squared length of a sequence)."""
    assert model.num_query_groups is not None
    assert model.kv_channels is not None
    heads, kv = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    mlps = sum(_mlp_products(model, layer) for layer in range(1, model.num_layers + 1))
    projections = model.num_layers * model.hidden_size * (2 * heads + 2 * kv)
    # Causal: a position meets half the sequence on average.
    return 2 * (projections + mlps), model.num_layers * 4 * heads / 2


def _mlp_products(model: ModelConfig, layer: int) -> int:
    """Multiply-adds per token: of the MLP, or of the router and the experts that a token goes to."""
    matrices = 3 if model.gated else 2
    if not model.has_experts(layer):
        assert model.ffn_hidden_size is not None
        return matrices * model.hidden_size * model.ffn_hidden_size
    assert model.num_moe_experts is not None
    assert model.moe_ffn_hidden_size is not None
    experts = model.moe_router_topk * matrices * model.hidden_size * model.moe_ffn_hidden_size
    return experts + model.hidden_size * model.num_moe_experts


def step_flops(model: ModelConfig, batch: GroupBatch, *, scoring_pass: bool) -> float:
    """Multiply-adds x 2 of one optimizer step over real tokens: forward, backward (twice the forward), scoring.

    Matrix products only; recomputation and padding are not counted, as in model FLOPs utilisation. The output layer
    is counted at response tokens alone.
    """
    assert model.vocab_size is not None
    per_token, attention = _layer_flops(model)
    forward = 0.0
    for row in batch.rows:
        length = len(row.tokens_S)
        forward += per_token * length + attention * length * length
        forward += 2 * model.hidden_size * model.vocab_size * len(row.target_positions_T)
    return forward * (4 if scoring_pass else 3)
