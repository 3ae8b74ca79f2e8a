"""Runs on the ranks: the layout of modules of Transformer Engine's spec, made of Megatron's own on the CPU.

``NormColumn`` stands for the one module without a local counterpart, Transformer Engine's norm and column-parallel
layer in one, with its names. What this shows is the spec: which norm goes where, names and shards in checkpoints. What
Transformer Engine's modules compute is for tests/gpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from group_samples import make_samples
from layout_case import MODELS
from layout_run import set_weights
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.mcore import policy as policy_file
from megatron_groupdpo.mcore.checkpoint.folders import Progress
from megatron_groupdpo.mcore.checkpoint.training import load_weights, save_checkpoint
from megatron_groupdpo.mcore.model import build as model_file
from megatron_groupdpo.mcore.model.attention import SdpaAttention
from megatron_groupdpo.mcore.model.norm import norm_class
from megatron_groupdpo.mcore.model.te_spec import LayerParts
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.reference.score import score_groups

_ROPE = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": MODELS["gpt"],
    "llama": MODELS["llama-untied"],
    "qwen3": MODELS["llama"] | {"qk_layernorm": True},
    "mistral": MODELS["llama"] | {"window_size": (5, 0)},
    "olmo2": MODELS["llama"] | {"norm_position": "post", "qk_layernorm": True, "qk_layernorm_across_heads": True},
    "olmo3": MODELS["llama"]
    | {"norm_position": "post", "qk_layernorm": True, "qk_layernorm_across_heads": True, "window_size": (5, 0)}
    | {"window_attn_skip_freq": (2,), "rotary_base_local": 10000, "rope_scaling_type": "yarn"}
    | {"rope_scaling_attention_factor": 1.2, "rope_scaling_original_length": 16},
    "gemma3": MODELS["llama"]
    | {"norm_position": "sandwich", "qk_layernorm": True, "apply_layernorm_1p": True, "window_size": (5, 0)}
    | {"window_attn_skip_freq": (2,), "rotary_base": 50000, "rotary_base_local": 10000, "scale_embeddings": True},
}

_EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": FAMILIES["mistral"] | _EXPERTS,
    "qwen3-moe": FAMILIES["qwen3"] | _EXPERTS | {"moe_layer_freq": (1, 0, 1, 1), "moe_router_pre_softmax": True},
    "olmoe": FAMILIES["llama"] | _EXPERTS | {"qk_layernorm": True, "qk_layernorm_across_heads": True},
}
"""Of these there are no stand-ins for Transformer Engine's grouped layers here; ``te_case.py`` has the real ones."""


class NormColumn(ColumnParallelLinear):
    """A norm, then a column-parallel linear layer; the norm's parameters are the layer's own."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = norm_class(config.normalization)(config, input_size, config.layernorm_epsilon)
        for name, parameter in list(norm.named_parameters()):
            self.register_parameter(f"layer_norm_{name}", parameter)
        self._norm = [norm]  # not a submodule: its parameters are registered above

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self._norm[0](input_), *args, **kwargs)

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1, dtype=torch.uint8)  # which a checkpoint of the local spec does not have

    def set_extra_state(self, state: torch.Tensor) -> None: ...

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = {name: entry for name, entry in self.state_dict(prefix="", keep_vars=True).items() if entry is not None}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"] if metadata else None,
        )


def sized(family: str, *, small: bool = False) -> dict[str, Any]:
    """A family's model in sizes that FP8 takes."""
    from two_pass_case import MODEL, SMALLER

    plain = {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True}
    chosen = MODEL | SMALLER if small else MODEL
    sizes = {name: chosen[name] for name in ("hidden_size", "ffn_hidden_size", "kv_channels")}
    experts = {"moe_ffn_hidden_size": 128} if "num_moe_experts" in (FAMILIES | MIXTURES)[family] else {}
    return plain | (FAMILIES | MIXTURES)[family] | sizes | experts


def local_parts(model: ModelConfig) -> LayerParts:
    return LayerParts(
        norm_and_column=NormColumn,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        core_attention=SdpaAttention,
        norm=norm_class(model.normalization),
    )


def compare_specs(family: str, layout: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Log-probabilities under both specs with one checkpoint's weights, and whether both name them alike."""
    parallel = ParallelConfig(device="cpu", **layout)
    ranks = initialize(parallel, seed=1)
    model = ModelConfig(**FAMILIES[family])
    try:
        local = _policy(model, parallel, ranks)
        set_weights(local)
        save_checkpoint(Path(folder), local.chunks, progress=Progress(), model=local.identity, config={})
        kept = policy_file.choose_transformer_impl, model_file.transformer_engine_parts
        policy_file.choose_transformer_impl = lambda *_, **__: "transformer_engine"
        model_file.transformer_engine_parts = lambda: local_parts(model)
        try:
            fused = _policy(model, parallel, ranks)
        finally:
            policy_file.choose_transformer_impl, model_file.transformer_engine_parts = kept
        load_weights(Path(folder) / "iter_0000000", fused.chunks, model=fused.identity)
        return {
            "local": _logps(local, parallel, ranks),
            "fused": _logps(fused, parallel, ranks),
            "digests": (local.weights_digest(), fused.weights_digest()),
            "modules": sorted({type(module).__name__ for chunk in fused.chunks for module in chunk.modules()}),
        }
    finally:
        shut_down()


def _policy(model: ModelConfig, parallel: ParallelConfig, ranks: Ranks) -> Policy:
    return build_policy(model, parallel, PrecisionConfig(log_probs_chunk_size=7), ranks, seed=5, training=False)


def _logps(policy: Policy, parallel: ParallelConfig, ranks: Ranks) -> Any:
    plan = plan_options(parallel, data_parallel_size=ranks.dp_group.size(), max_tokens_per_microbatch=64)
    _, logps_R = score_groups(policy, make_samples(3), plan)
    return None if logps_R is None else logps_R.numpy()
