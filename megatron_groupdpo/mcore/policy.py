"""A model on this rank's part of the layout, ready to score, train or sample."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.mixture import check_mixture
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.checkpoint import find_checkpoint, load_weights, read_common
from megatron_groupdpo.mcore.digest import count_parameters, weights_digest
from megatron_groupdpo.mcore.engine import MegatronEngine
from megatron_groupdpo.mcore.init import initialize_weights
from megatron_groupdpo.mcore.model import build_model, transformer_config, wrap_for_inference, wrap_for_training
from megatron_groupdpo.mcore.setup import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Model chunks with everything that was decided when they were built."""

    model: ModelConfig
    config: TransformerConfig
    ranks: Ranks
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
        """Layout-independent digest of the weights; a collective call."""
        assert self.model.vocab_size is not None
        return weights_digest(self.chunks, vocab_size=self.model.vocab_size, device=self.ranks.device)


def build_policy(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    ranks: Ranks,
    *,
    seed: int,
    training: bool,
) -> Policy:
    """A model with seeded initial weights, the same on every layout.

    Raises:
        ConfigError: Megatron refuses the model on this layout, or Transformer Engine is asked for and absent.
    """
    check_mixture(model, parallel, training=training)
    model = resolved(model)
    assert model.vocab_size is not None
    config = transformer_config(model, parallel, precision)
    transformer_impl = choose_transformer_impl(
        model, ranks.device, context_parallel_size=parallel.context_parallel_size
    )
    chunks = build_model(model, parallel, config, transformer_impl=transformer_impl)
    initialize_weights(chunks, model, seed=seed)
    wrapped = wrap_for_training(chunks, config, parallel) if training else wrap_for_inference(chunks, config)
    engine = MegatronEngine(
        wrapped, config, ranks, vocab_size=model.vocab_size, log_probs_chunk_size=precision.log_probs_chunk_size
    )
    return Policy(model=model, config=config, ranks=ranks, chunks=wrapped, engine=engine)


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


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide which tensors a model has and what it computes."""
    not_the_model = {"transformer_impl", "attention_dropout", "hidden_dropout", "init_method_std"}
    return {name: value for name, value in dataclasses.asdict(resolved(model)).items() if name not in not_the_model}


def choose_transformer_impl(model: ModelConfig, device: torch.device, *, context_parallel_size: int = 1) -> str:
    """``local`` or ``transformer_engine``; the latter needs the package, a GPU, and a model that its layers can be."""
    if model.transformer_impl == "local" or (model.transformer_impl == "auto" and device.type == "cpu"):
        return "local"
    problem = "the run's device is the CPU" if device.type == "cpu" else _transformer_engine_problem()
    if problem is None:
        lacks = _transformer_engine_lacks(model, context_parallel_size)
        if lacks is None:
            return "transformer_engine"
        if model.transformer_impl == "auto":
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"transformer_impl auto: local layers, since Transformer Engine's have no {lacks}", flush=True)
            return "local"
        raise ConfigError(
            f"transformer_impl 'transformer_engine' would compute another model: its layers have no {lacks}; set "
            "--transformer-impl local"
        )
    if model.transformer_impl == "auto":
        return "local"
    raise ConfigError(
        f"transformer_impl 'transformer_engine' cannot be had: {problem}; install the 'te' extra on a machine with a "
        "GPU, or set --transformer-impl local"
    )


def _transformer_engine_lacks(model: ModelConfig, context_parallel_size: int) -> str | None:
    """What the model needs and Megatron's Transformer Engine layers do not have, with the field that asks for it."""
    if model.num_moe_experts is not None:
        return f"mixture of experts (num_moe_experts {model.num_moe_experts})"
    if model.norm_position != "pre":
        return f"norms after attention and MLP (norm_position {model.norm_position!r})"
    if model.qk_layernorm_across_heads:
        return "norm over all heads together (qk_layernorm_across_heads)"
    if model.rotary_base_local is not None:
        return f"second RoPE for layers with the window (rotary_base_local {model.rotary_base_local})"
    if model.window_size and context_parallel_size > 1:
        return f"sliding window under ring context parallelism (context_parallel_size {context_parallel_size})"
    return None


def _transformer_engine_problem() -> str | None:
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:  # a partial installation raises RuntimeError or FileNotFoundError, not ImportError
        return f"importing it fails ({error})"
    return None
