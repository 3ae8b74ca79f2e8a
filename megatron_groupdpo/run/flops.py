"""Floating-point operations a step needs, counted from the shapes."""

from __future__ import annotations

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.types import GroupBatch


def step_flops(model: ModelConfig, batch: GroupBatch, *, scoring_pass: bool) -> float:
    """Multiply-adds x 2 of one optimizer step over real tokens: forward, backward (twice the forward), scoring.

    Matrix products only; recomputation and padding are not counted, as in model FLOPs utilisation. Attention is
    causal: a position meets half the sequence on average. The output layer is counted at response tokens alone.
    """
    assert model.ffn_hidden_size is not None
    assert model.num_query_groups is not None
    assert model.kv_channels is not None
    assert model.vocab_size is not None
    heads, kv = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    mlp = model.hidden_size * model.ffn_hidden_size * (3 if model.swiglu else 2)
    per_token = 2 * model.num_layers * (model.hidden_size * (2 * heads + 2 * kv) + mlp)
    forward = 0.0
    for row in batch.rows:
        length = len(row.tokens_S)
        forward += per_token * length + model.num_layers * 4 * heads * length * length / 2
        forward += 2 * model.hidden_size * model.vocab_size * len(row.target_positions_T)
    return forward * (4 if scoring_pass else 3)
