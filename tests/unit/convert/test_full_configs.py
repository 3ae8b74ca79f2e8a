"""The models of the GroupDPO paper, and one of each mixture, at full size: every tensor has a place.

The values are those of Qwen/Qwen3-4B, allenai/Olmo-3-7B-Instruct, allenai/Olmo-3.1-32B-Instruct and
google/gemma-3-4b-it on the Hugging Face hub, compared on 2026-11-21 with what others publish of them: Ai2's Molmo
code (its model configurations OLMO3_7B_INSTRUCT and QWEN3_4B), Tenstorrent's and others' notes on Olmo-3.1-32B (RoPE,
window, sizes), simaai/gemma-3-4b-it-a16w4's devkit/vlm_config.json. The files themselves could not be fetched. Those of
mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B and allenai/OLMoE-1B-7B-0924 are written from memory. Fields that do not
matter are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import tensors_of
from hf_examples import CONFIGS, named_as_in_files
from safetensors.torch import save_file

from megatron_groupdpo.convert.families import FAMILIES, family_of_config
from megatron_groupdpo.convert.hf.model import model_of_config, open_hf_model, text_part
from megatron_groupdpo.convert.tensors.plan import conversion_plan

OLMO = {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
FULL: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmo-3-7b": OLMO
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    "olmo-3.1-32b": OLMO
    | {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "initializer_range": 0.02,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
}
WANTED: dict[str, dict[str, Any]] = {
    "qwen3-4b": {"qk_layernorm": True, "kv_channels": 128, "rotary_base": 1000000, "window_size": ()},
    "olmo-3-7b": {
        "norm_position": "post",
        "window_size": (4095, 0),
        "window_attn_skip_freq": (4,),
        "rope_scaling_type": "yarn",
        "rope_scaling_attention_factor": 1.2079441541679836,
        "rotary_base_local": 500000,
    },
    "olmo-3.1-32b": {"num_query_groups": 8, "kv_channels": 128, "qk_layernorm_across_heads": True},
    "mixtral-8x7b": {"num_moe_experts": 8, "moe_ffn_hidden_size": 14336, "moe_router_pre_softmax": False},
    "qwen3-30b-a3b": {
        "num_moe_experts": 128,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 768,
        "moe_router_pre_softmax": False,
        "moe_layer_freq": (),
        "kv_channels": 128,
    },
    "olmoe-1b-7b": {"num_moe_experts": 64, "moe_router_pre_softmax": True, "qk_layernorm_across_heads": True},
    "gemma-3-4b": {
        "norm_position": "sandwich",
        "num_query_groups": 4,
        "kv_channels": 256,
        "vocab_size": 262208,
        "window_size": (1023, 0),
        "window_attn_skip_freq": (6,),
        "rotary_base": 1000000,
        "rotary_base_local": 10000,
        "rope_scaling_type": "linear",
        "rope_scaling_factor": 8.0,
        "softmax_scale": None,
    },
}


def test_every_family_has_a_tiny_model_to_compare_with_transformers():
    tiny = [family_of_config({"model_type": make().model_type}).name for make in CONFIGS.values()]
    assert set(tiny) == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_map_every_tensor_of_transformers(name: str):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = FULL[name]
    family = family_of_config(config)
    inner = text_part(family, dict(config))
    model = model_of_config(family, inner)
    assert {field: getattr(model, field) for field in WANTED[name]} == WANTED[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type].from_dict(inner))
    in_files = named_as_in_files(dict(theirs.named_parameters()), family.model_type)
    shapes = {key: tuple(parameter.shape) for key, parameter in in_files.items()}
    mapped = {key: shape for pair in conversion_plan(family, model).values() for key, shape in pair.hf.items()}
    assert mapped == shapes
    back = model_of_config(family, {**family.to_hf(model), "model_type": family.model_type})
    assert back == model


@pytest.mark.parametrize("start", ["language_model.model.", "model.language_model."])
def test_the_text_model_is_taken_out_of_a_model_with_vision(own_copy: Callable[[str], Path], start: str):
    folder = own_copy("gemma3")
    before = open_hf_model(folder)
    config = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = {name.replace("model.", start, 1): tensor for name, tensor in tensors_of(folder).items()}
    vision = {
        "vision_tower.embed.weight": torch.ones(2),
        "multi_modal_projector.mm_input_projection_weight": torch.ones(2),
    }
    save_file(tensors | vision, folder / "model.safetensors", metadata={"format": "pt"})
    after = open_hf_model(folder)
    assert after.model == before.model
    assert set(after.ignored) == set(vision)
    assert after.config["architectures"] == ["Gemma3ForCausalLM"]
    assert all(torch.equal(after.read(key), before.read(key)) for key in before.plan)
