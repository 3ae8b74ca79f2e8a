"""Megatron-Core's GPTModel from a :class:`ModelConfig`: the only place that builds a model.

Megatron-Core 0.19 announces ``HybridModel`` as the successor of ``GPTModel``; that switch would be made here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.model.attention import SdpaAttention
from megatron_groupdpo.mcore.model.moe import allow_without_sequence_parallelism, mark_experts, mixture_mlp, moe_fields
from megatron_groupdpo.mcore.model.norm import AcrossHeadsRMSNorm, PostNormLayer, norm_class
from megatron_groupdpo.mcore.model.rotary import (
    ScaledRotaryEmbedding,
    TwoRopeSelfAttention,
    score_factor,
    take_angles_by_token,
)
from megatron_groupdpo.mcore.model.te_spec import fused_layer_spec, transformer_engine_parts

# GPTModel warns on every construction that HybridModel will replace it; said once, in the docstring above.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)

_ACTIVATIONS: dict[str, Any] = {
    "gelu": torch.nn.functional.gelu,
    "gelu-tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    transformer_impl: str = "local",
    fp8_weights: bool = False,
) -> TransformerConfig:
    """Megatron's configuration for this run.

    ``calculate_per_token_loss`` is set so that nothing rescales the loss or the gradient: ``passes/engine.py``. With
    ``fp8_weights`` Transformer Engine's linear layers are built with weights in FP8.

    Raises:
        ConfigError: Megatron refuses the combination; its reason is passed on.
    """
    pp = parallel.pipeline_model_parallel_size
    dtype = torch.bfloat16 if precision.bf16 else torch.float32
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    try:
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            softmax_scale=_softmax_scale(model),
            window_size=(model.window_size[0], 0) if model.window_size else None,
            window_attn_skip_freq=_skip_freq(model),
            normalization=model.normalization,
            layernorm_zero_centered_gamma=model.apply_layernorm_1p,
            layernorm_epsilon=model.norm_epsilon,
            gated_linear_unit=model.gated,
            activation_func=_ACTIVATIONS["silu" if model.swiglu else model.activation],
            add_bias_linear=model.add_bias_linear,
            add_qkv_bias=model.add_qkv_bias,
            qk_layernorm=model.qk_layernorm,
            init_method_std=model.init_method_std,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            attention_softmax_in_fp32=True,
            persist_layer_norm=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            # Transformer Engine's layers are told one by one: see ``fp8.state.fuse_weight_gradients``.
            gradient_accumulation_fusion=precision.gradient_accumulation_fusion and transformer_impl == "local",
            apply_rope_fusion=precision.apply_rope_fusion,
            attention_backend=AttnBackend[precision.attention_backend],
            calculate_per_token_loss=True,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=precision.bf16,
            recompute_granularity=precision.recompute_granularity,
            recompute_method=precision.recompute_method,
            recompute_num_layers=precision.recompute_num_layers,
            deterministic_mode=precision.deterministic_mode,
            # Interleaved stages send forward and backward messages between the same two ranks; unless sends and
            # receives are ordered one by one, messages mix at pipeline size 2.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            cuda_graph_modules=[],  # the same as its default, which Megatron itself warns of
            use_cpu_initialization=False,
            perform_initialization=False,
            **_fp8_fields(precision, weights=fp8_weights),
            **moe_fields(model, parallel),
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core refuses this model or layout: {error}") from error


def _fp8_fields(precision: PrecisionConfig, *, weights: bool) -> dict[str, Any]:
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe or "delayed",
        "fp8_param": weights,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _softmax_scale(model: ModelConfig) -> float | None:
    """None for Megatron's own, 1/sqrt(kv_channels); what differs between layers is left to ``SdpaAttention``."""
    factor = score_factor(model, windowed=True)
    assert model.kv_channels is not None
    if model.softmax_scale is None and factor == 1:
        return None
    return factor * (model.softmax_scale or 1 / math.sqrt(model.kv_channels))


def _skip_freq(model: ModelConfig) -> int | list[int] | None:
    """As Megatron spells it: every N-th layer, or a mark for each layer."""
    layers = model.window_attn_skip_freq
    if len(layers) > 1:
        return list(layers)
    return layers[0] if layers else None


def local_layer_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Layers from Megatron-Core and PyTorch alone, with our norm and attention."""
    norm = norm_class(model.normalization)
    submodules = get_gpt_layer_local_submodules(qk_layernorm=model.qk_layernorm, normalization=model.normalization)
    attention: Any = submodules.self_attention
    full_factor = score_factor(model, windowed=False) / score_factor(model, windowed=True)
    replaced: dict[str, Any] = {"core_attention": partial(SdpaAttention, full_attention_factor=full_factor)}
    if model.qk_layernorm_across_heads:
        heads = {"q_layernorm": model.num_attention_heads, "k_layernorm": model.num_query_groups}
        replaced |= {name: partial(AcrossHeadsRMSNorm, num_heads=number) for name, number in heads.items()}
    elif model.qk_layernorm:
        replaced |= {"q_layernorm": norm, "k_layernorm": norm}
    norm_before = IdentityOp if model.norm_position == "post" else norm
    submodules = dataclasses.replace(
        submodules,
        input_layernorm=norm_before,
        pre_mlp_layernorm=norm_before,
        self_attention=dataclasses.replace(
            attention,
            module=SelfAttention if model.rotary_base_local is None else TwoRopeSelfAttention,
            submodules=dataclasses.replace(attention.submodules, **replaced),
        ),
        # Keys as the modules name them; the map only serves checkpoints shared with fused layers.
        sharded_state_dict_keys_map={},
    )
    layer_class = TransformerLayer if model.norm_position == "pre" else PostNormLayer
    dense = mixture = ModuleSpec(module=layer_class, submodules=submodules)
    if model.num_moe_experts is not None:
        with_experts = dataclasses.replace(submodules, mlp=mixture_mlp(model.num_moe_experts))
        mixture = ModuleSpec(module=layer_class, submodules=with_experts)
    first = get_transformer_layer_offset(config, vp_stage) + 1
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    layers = [mixture if model.has_experts(number) else dense for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """Vocabulary rows after padding to a multiple of ``divisible_by * tensor_parallel``, Megatron's rule."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    *,
    transformer_impl: str,
) -> list[torch.nn.Module]:
    """This rank's model chunks: one, or ``virtual_pipeline_model_parallel_size`` of them."""
    assert model.vocab_size is not None, "the vocabulary size is filled in from the tokenizer before"
    num_chunks = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(num_chunks or 1):
        vp_stage = stage if num_chunks else None
        spec: Any = (
            fused_layer_spec(
                model,
                config,
                vp_stage,
                transformer_engine_parts(),
                local_attention=config.attention_backend == AttnBackend.local,
            )
            if transformer_impl == "transformer_engine"
            else local_layer_spec(model, config, vp_stage)
        )
        chunk = _gpt_model(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(
                model.vocab_size,
                divisible_by=model.make_vocab_size_divisible_by,
                tensor_parallel=parallel.tensor_model_parallel_size,
            ),
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=int(model.rotary_base),
            vp_stage=vp_stage,
        )
        if model.rope_scaling_type is not None or model.rotary_base_local is not None:
            chunk.rotary_pos_emb = ScaledRotaryEmbedding(model, cp_group=chunk.pg_collection.cp)
        if model.position_embedding_type == "rope" and not config.apply_rope_fusion:
            take_angles_by_token(chunk)
        if model.scale_embeddings and chunk.pre_process:
            # Rounded to the weights' precision, as models that do this were trained; a number, not a tensor, since a
            # tensor would be copied to the device in every forward.
            scale = float(torch.tensor(math.sqrt(model.hidden_size), dtype=config.params_dtype))
            chunk.embedding.register_forward_hook(partial(_scaled, scale))
        chunks.append(chunk.to(torch.cuda.current_device()))
    return chunks


def _gpt_model(**arguments: Any) -> GPTModel:
    try:
        return GPTModel(**arguments)
    except AssertionError as error:  # say of NVTE_* variables that do not go with attention_backend
        raise ConfigError(f"Megatron-Core refuses this model or layout: {error}") from error


def _scaled(scale: float, _module: torch.nn.Module, _inputs: Any, embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings * scale


def wrap_for_inference(chunks: list[torch.nn.Module], config: TransformerConfig) -> list[torch.nn.Module]:
    """Half precision where asked; no gradient buffers.

    The weights still require gradients: for frozen ones Megatron takes another linear function, whose product may
    round otherwise than the policy's (seen: one fp32 unit, tensor parallel, one row). Callers use ``torch.no_grad``.
    """
    for chunk in chunks:
        allow_without_sequence_parallelism(chunk)
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else chunks


def wrap_for_training(
    chunks: list[torch.nn.Module],
    config: TransformerConfig,
    parallel: ParallelConfig,
    *,
    captured: bool = False,
) -> list[DistributedDataParallel]:
    """Half-precision wrapper where asked, then Megatron's gradient buffers (float32, summed over the ranks).

    ``captured``: layers will be captured as CUDA graphs.
    """
    for chunk in chunks:
        mark_experts(chunk)
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=bool(config.fp8_param),
        bucket_size=parallel.ddp_bucket_size,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # scores and the gradient norm are checked, with a message, in the step
    )
    with _in_a_stream_of_its_own() if captured else contextlib.nullcontext():
        return [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]


@contextlib.contextmanager
def _in_a_stream_of_its_own() -> Iterator[None]:
    """Megatron's hooks keep the weights' gradient nodes, each with the stream that it was made in. A backward makes
    that stream wait, and the default one cannot wait for a capture. Megatron's ``training.py`` takes another one too.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
