"""A model on this rank's part of the layout, ready to score, train or sample."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.rules.mixture import check_mixture
from megatron_groupdpo.mcore.checkpoint.digest import count_parameters, weights_digest
from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint, read_common
from megatron_groupdpo.mcore.checkpoint.training import load_weights
from megatron_groupdpo.mcore.fp8.passes import TwoPassScaling
from megatron_groupdpo.mcore.fp8.state import TransformerEngineState, fuse_weight_gradients
from megatron_groupdpo.mcore.fp8.weights import full_weights, keep_in_fp8
from megatron_groupdpo.mcore.model.build import build_model, transformer_config, wrap_for_inference, wrap_for_training
from megatron_groupdpo.mcore.model.implementation import check_kernels, choose_transformer_impl
from megatron_groupdpo.mcore.model.init import initialize_weights
from megatron_groupdpo.mcore.passes.cuda_graphs import layer_graphs
from megatron_groupdpo.mcore.passes.engine import MegatronEngine
from megatron_groupdpo.mcore.passes.logprobs import choose_fused
from megatron_groupdpo.mcore.setup import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Model chunks with everything that was decided when they were built."""

    model: ModelConfig
    config: TransformerConfig
    precision: PrecisionConfig
    ranks: Ranks
    transformer_impl: str
    """``local`` or ``transformer_engine``."""
    chunks: list[Any]
    """Wrapped: gradient buffers for training, half precision."""
    engine: MegatronEngine

    @property
    def identity(self) -> dict[str, Any]:
        """What two checkpoints of one model agree on."""
        return model_identity(self.model)

    def num_parameters(self) -> int:
        """Of the whole model, padding of the vocabulary included; a collective call."""
        return count_parameters(self.chunks, device=self.ranks.device)

    def weights_digest(self) -> str:
        """Layout-independent digest of the weights, and of what the model computes with them; a collective call."""
        assert self.model.vocab_size is not None
        return weights_digest(
            self.chunks, vocab_size=self.model.vocab_size, device=self.ranks.device, function=function_of(self.model)
        )


def build_policy(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    ranks: Ranks,
    *,
    seed: int | None,
    training: bool,
) -> Policy:
    """A model with seeded initial weights, the same on every layout; without a seed, for the caller to fill.

    Raises:
        ConfigError: Megatron refuses the model on this layout; or Transformer Engine, an FP8 recipe or a kernel is
            asked for and cannot be had.
    """
    check_mixture(model, parallel, training=training)
    model = resolved(model)
    assert model.vocab_size is not None
    transformer_impl = choose_transformer_impl(
        model, ranks.device, context_parallel_size=parallel.context_parallel_size, precision=precision
    )
    check_kernels(precision, transformer_impl, ranks.device)
    # Without an optimizer, bf16 weights are all there is to quantize from.
    fp8_weights = precision.fp8_param_gather and training
    config = transformer_config(model, parallel, precision, transformer_impl=transformer_impl, fp8_weights=fp8_weights)
    chunks = build_model(model, parallel, config, transformer_impl=transformer_impl)
    if precision.gradient_accumulation_fusion and transformer_impl == "transformer_engine":
        assert all(fuse_weight_gradients(chunk) for chunk in chunks), "Transformer Engine's layers say how they add up"
    if fp8_weights:
        assert seed is not None, "scales would follow from memory that nobody filled"
        keep_in_fp8(chunks)
    if seed is not None:
        with full_weights(chunks, read=False, changed=True):
            initialize_weights(chunks, model, seed=seed)
    if training:
        wrapped: list[Any] = [*wrap_for_training(chunks, config, parallel, captured=precision.cuda_graphs)]
    else:
        wrapped = wrap_for_inference(chunks, config)
    scaling = None
    if precision.fp8_recipe is not None:
        scaling = TwoPassScaling(TransformerEngineState(wrapped, recipe=precision.fp8_recipe, device=ranks.device))
    engine = MegatronEngine(
        wrapped,
        config,
        ranks,
        vocab_size=model.vocab_size,
        log_probs_chunk_size=precision.log_probs_chunk_size,
        fused_logprobs=choose_fused(precision.fused_logprobs, ranks.device),
        bounds_on_host="local" in (transformer_impl, precision.attention_backend),
        scaling=scaling,
        graphs=layer_graphs(wrapped, precision, ranks) if training else None,
    )
    return Policy(
        model=model,
        config=config,
        precision=precision,
        ranks=ranks,
        transformer_impl=transformer_impl,
        chunks=wrapped,
        engine=engine,
    )


def load_policy(
    path: Path, parallel: ParallelConfig, precision: PrecisionConfig, ranks: Ranks, *, training: bool = False
) -> Policy:
    """The model of a checkpoint, which says itself what model it is.

    Raises:
        CheckpointError: no checkpoint there.
        ConfigError: the layout does not fit the model.
    """
    folder = find_checkpoint(path)
    model = ModelConfig(**read_common(folder)["model"])
    policy = build_policy(model, parallel, precision, ranks, seed=0, training=training)
    load_weights(folder, policy.chunks, model=policy.identity)
    return policy


def resolved(model: ModelConfig) -> ModelConfig:
    """Sizes that may be left out, filled in by Megatron's rules."""
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    return dataclasses.replace(
        model,
        ffn_hidden_size=ffn,
        moe_ffn_hidden_size=(model.moe_ffn_hidden_size or ffn) if model.num_moe_experts else None,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
    )


def function_of(model: ModelConfig) -> str:
    """The fields that log-probabilities depend on beside the weights, as text: two models with equal weights and other
    RoPE bases, say, are two references."""
    only_sizes = {"vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings"}
    fields = {name: value for name, value in model_identity(model).items() if name not in only_sizes}
    return json.dumps(fields, sort_keys=True)


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide which tensors a model has and what it computes."""
    not_the_model = {"transformer_impl", "attention_dropout", "hidden_dropout", "init_method_std"}
    return {name: value for name, value in dataclasses.asdict(resolved(model)).items() if name not in not_the_model}
