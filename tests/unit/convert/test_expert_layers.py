"""Which layers of a Qwen3-MoE have experts, as transformers builds them."""

from __future__ import annotations

import pytest
import torch

from megatron_groupdpo.convert.families import family_of_config
from megatron_groupdpo.convert.hf.model import model_of_config, text_part


@pytest.mark.parametrize(("step", "dense"), [(1, [0, 3]), (2, []), (3, []), (2, [1])])
def test_the_layers_with_experts_are_those_of_transformers(step: int, dense: list[int]):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    theirs = Qwen3MoeConfig(
        num_hidden_layers=6,
        hidden_size=32,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        vocab_size=128,
        decoder_sparse_step=step,
        mlp_only_layers=dense,
        architectures=["Qwen3MoeForCausalLM"],
    )
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(theirs).model.layers
    mixed = tuple(int(hasattr(layer.mlp, "experts")) for layer in layers)
    assert 0 < sum(mixed) < 6
    config = theirs.to_dict()
    family = family_of_config(config)
    model = model_of_config(family, text_part(family, config))
    assert model.moe_layer_freq == mixed
    back = family.to_hf(model)
    assert [int(i not in back["mlp_only_layers"]) for i in range(6)] == list(mixed)
    assert back["decoder_sparse_step"] == 1
