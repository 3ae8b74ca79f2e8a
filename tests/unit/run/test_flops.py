"""Operations of a step, counted by hand for one small model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.run.logs.flops import step_flops
from megatron_groupdpo.types import GroupBatch, ResponseRow

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 6,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 3,
    "ffn_hidden_size": 5,
    "swiglu": True,
    "vocab_size": 11,
}


def one_row() -> GroupBatch:
    """Four tokens, two of the response."""
    row = ResponseRow(index=0, tokens_S=np.zeros(4, dtype=np.int32), target_positions_T=np.array([2, 3]))
    one = torch.ones(1, 1)
    return GroupBatch(
        rows=(row,),
        flat_index_GK=torch.zeros(1, 1, dtype=torch.int64),
        labels_GK=one.to(torch.int8),
        values_GK=one.double(),
        tie_keys_GK=one.long(),
        group_keys_G=one[0].long(),
        response_ids_R=one[0].long(),
        num_tokens_R=torch.tensor([2]),
    )


def test_flops_count_every_matrix_product_of_both_passes():
    model, batch = ModelConfig(**SIZES), one_row()
    query, key_value, out = 6 * 6, 2 * 6 * 3, 6 * 6
    mlp = 3 * 6 * 5
    linear = 2 * (query + key_value + out + mlp) * 4  # tokens
    attention = 2 * (2 * 4 * 4 * 6) / 2  # q k and p v, 4 x 4 positions, 6 channels, half of them causal
    head = 2 * 6 * 11 * 2  # response tokens
    forward = 2 * (linear + attention) + head
    assert step_flops(model, batch, scoring_pass=True) == 4 * forward
    assert step_flops(model, batch, scoring_pass=False) == 3 * forward


def test_a_token_costs_its_experts_and_the_router():
    mixture = {"num_moe_experts": 7, "moe_router_topk": 3, "moe_ffn_hidden_size": 4, "moe_layer_freq": (0, 1)}
    dense, mixed = (
        step_flops(ModelConfig(**SIZES, **fields), one_row(), scoring_pass=False) for fields in ({}, mixture)
    )
    mlp, experts, router = 3 * 6 * 5, 3 * (3 * 6 * 4), 6 * 7
    assert mixed - dense == 3 * 2 * 4 * (experts + router - mlp)
