"""Fields of a mixture of experts that contradict each other, or the layout, are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from config_examples import example

from megatron_groupdpo.config import ModelConfig, ParallelConfig, validate
from megatron_groupdpo.config.rules.mixture import check_mixture
from megatron_groupdpo.errors import ConfigError

MIXTURE: dict[str, Any] = {"num_moe_experts": 4, "add_bias_linear": False}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

ACCEPTED = [
    ({}, 1),
    ({"expert_model_parallel_size": 2}, 2),
    ({"expert_model_parallel_size": 4, "use_distributed_optimizer": True}, 8),
    ({"expert_model_parallel_size": 2, **TP2_SP}, 4),
    ({"expert_model_parallel_size": 2, "context_parallel_size": 2}, 2),
    ({"moe_layer_freq": (2,)}, 1),
    ({"moe_layer_freq": (0, 1, 1, 0), "pipeline_model_parallel_size": 2}, 2),
    ({"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_router_dtype": "fp32"}, 1),
]
REFUSED = [
    ({"num_moe_experts": None, "expert_model_parallel_size": 2}, 2, "num_moe_experts is not given; set it to 1"),
    ({"num_moe_experts": None, "moe_router_topk": 4}, 1, "moe_router_topk (4) would act on nothing"),
    ({"num_moe_experts": None, "moe_token_dispatcher_type": "allgather"}, 1, "would act on nothing"),
    ({"expert_model_parallel_size": 3}, 3, "num_moe_experts (4) must be a multiple of expert_model_parallel_size (3)"),
    ({"expert_model_parallel_size": 2}, 3, "world size (3) must be a multiple of tensor x pipeline x expert"),
    ({"expert_model_parallel_size": 2, **TP2_SP}, 2, "parallel size = 4"),
    ({"tensor_model_parallel_size": 2}, 2, "add --sequence-parallel"),
    ({"moe_ffn_hidden_size": 33, **TP2_SP}, 2, "moe_ffn_hidden_size (33) must be a multiple"),
    ({"moe_router_topk": 5}, 1, "moe_router_topk (5) must be <= num_moe_experts (4)"),
    ({"moe_router_topk": 1}, 1, "set moe_router_pre_softmax"),
    ({"add_bias_linear": True}, 1, "set --no-add-bias-linear"),
    ({"moe_layer_freq": (1, 0, 1)}, 1, "or num_layers (4) numbers"),
    ({"moe_layer_freq": (0, 0, 0, 0)}, 1, "some of them 1"),
    ({"moe_layer_freq": (1, 1, 0, 0), "pipeline_model_parallel_size": 2}, 2, "pipeline stage 2 of 2"),
    ({"moe_aux_loss_coeff": 0.01}, 1, "moe_aux_loss_coeff (0.01) is refused"),
    ({"moe_z_loss_coeff": 0.01}, 1, "moe_z_loss_coeff (0.01) is refused"),
    ({"moe_expert_capacity_factor": 1.0}, 1, "depend on its neighbours"),
    ({"moe_router_enable_expert_bias": True}, 1, "counts of tokens"),
]


@pytest.mark.parametrize(("changes", "world_size"), ACCEPTED, ids=lambda case: str(case)[:60])
def test_sound_mixtures_pass(changes: dict[str, Any], world_size: int):
    validate(example(**MIXTURE | changes), world_size)


@pytest.mark.acts(
    "ModelConfig.moe_aux_loss_coeff",
    "ModelConfig.moe_z_loss_coeff",
    "ModelConfig.moe_expert_capacity_factor",
    "ModelConfig.moe_router_enable_expert_bias",
    refused=True,
)
@pytest.mark.parametrize(("changes", "world_size", "words"), REFUSED, ids=lambda case: str(case)[:60])
def test_contradictions_of_a_mixture_are_refused(changes: dict[str, Any], world_size: int, words: str):
    with pytest.raises(ConfigError, match=re.escape(words)) as refusal:
        validate(example(**MIXTURE | changes), world_size)
    assert "problems" not in str(refusal.value)


def test_a_checkpoint_that_does_not_fit_the_layout_is_refused_before_it_is_built():
    model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **MIXTURE)
    with pytest.raises(ConfigError, match="multiple of expert_model_parallel_size"):
        check_mixture(model, ParallelConfig(expert_model_parallel_size=3), training=False)
    tp2 = ParallelConfig(tensor_model_parallel_size=2)
    check_mixture(model, tp2, training=False)
    with pytest.raises(ConfigError, match="sequence-parallel"):
        check_mixture(model, tp2, training=True)


def test_layers_with_experts_are_counted_as_megatron_counts_them():
    def marks(**fields: Any) -> list[bool]:
        model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **fields)
        return [model.has_experts(layer) for layer in (1, 2, 3, 4)]

    assert marks() == [False] * 4
    assert marks(**MIXTURE) == [True] * 4
    assert marks(**MIXTURE, moe_layer_freq=(2,)) == [True, False, True, False]
    assert marks(**MIXTURE, moe_layer_freq=[0, 1, 1, 0]) == [False, True, True, False]
