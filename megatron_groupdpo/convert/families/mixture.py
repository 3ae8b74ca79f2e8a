"""What the families with experts share: the experts' tensors and fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, Rule, rule
from megatron_groupdpo.convert.families.decoder import LAYER
from megatron_groupdpo.convert.families.transforms import GATE_UP
from megatron_groupdpo.errors import ConfigError

EXPERTS = ("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk")
"""Fields of ModelConfig that :func:`mixture_config` writes."""
MIXTURE_READS = ("num_experts", "num_local_experts", "num_experts_per_tok")
"""Fields of config.json that :func:`mixture_fields` reads in every family."""
ROUTER_LOSS: Mapping[str, str] = dict.fromkeys(
    ("router_aux_loss_coef", "output_router_logits"), "the balancing loss is not computed, as it is not in evaluation"
)
LLAMA_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""An expert's projections where they have the names of Llama's MLP."""


def expert_rules(block: str, *, gate: str, up: str, down: str) -> Mapping[str, Rule]:
    """Rules of the router and the experts.

    Files hold one tensor an expert and projection; ``transformers`` 5 joins them in memory and parts them when saving
    (:func:`joined_experts`: unless told not to).

    Args:
        block: of a layer, where the others are.
        gate: an expert's projection behind the activation.
        up: the other half of the gated MLP.
        down: its output projection.
    """
    expert = f"{LAYER}{block}.experts.{{expert}}."
    return {
        "decoder.layers.mlp.router.weight": rule(f"{LAYER}{block}.gate.weight"),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": rule(
            f"{expert}{gate}.weight", f"{expert}{up}.weight", transform=GATE_UP
        ),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": rule(f"{expert}{down}.weight"),
    }


def joined_experts(block: str, *, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """What ``save_pretrained(save_original_format=False)`` writes in place of the tensors of :func:`expert_rules`."""
    expert = f".{block}.experts.{{expert}}."
    return {
        ".mlp.experts.gate_up_proj": (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        ".mlp.experts.down_proj": (f"{expert}{down}.weight",),
    }


def mixture_fields(config: HfConfig, *, width: str, normalized: bool) -> dict[str, Any]:
    """Fields of ModelConfig.

    Args:
        config: config.json.
        width: its field for the width of an expert.
        normalized: whether the weights of a token's experts sum to 1.
    """
    return {
        "num_moe_experts": _num_experts(config),
        "moe_ffn_hidden_size": config[width],
        "moe_router_topk": config["num_experts_per_tok"],
        # A softmax over all experts, divided by its sum over the chosen ones, is the softmax over those.
        "moe_router_pre_softmax": not normalized,
    }


def mixture_config(model: ModelConfig, family: str) -> dict[str, Any]:
    """Fields of config.json. Some readers look for the number of experts under one name, some under the other.

    Raises:
        ConfigError: the model has no experts.
    """
    if model.num_moe_experts is None:
        raise ConfigError(f"{family} has experts, the model none")
    return {
        "num_experts": model.num_moe_experts,
        "num_local_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "output_router_logits": False,
    }


def _num_experts(config: HfConfig) -> int:
    return next(config[name] for name in ("num_local_experts", "num_experts") if name in config)
