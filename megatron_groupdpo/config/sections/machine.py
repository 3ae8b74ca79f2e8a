"""Sections that say what runs and on which layout: model, parallel, precision. The field docs are the help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_groupdpo.config.sections.bounds import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model. Names, meanings and defaults are Megatron's, except that dropout is 0."""

    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP (of each half of a gated one); none: 4 x hidden_size."""
    num_query_groups: PositiveInt | None = None
    """Key-value heads, for grouped-query attention; none: one per query head."""
    kv_channels: PositiveInt | None = None
    """Width of a head; none: hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt = 4096
    """Longest sequence the model has positions for; rows of the table with learned_absolute."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "learned_absolute"
    """How positions enter the model."""
    rotary_base: PositiveInt = 10000
    """Base of the rotary frequencies (rope only)."""
    rotary_percent: Fraction = 1.0
    """Share of a head's channels that is rotated (rope only)."""
    rotary_base_local: PositiveInt | None = None
    """Base of the rotary frequencies in layers with the window, which are then not scaled; none: one RoPE for all."""
    rope_scaling_type: Literal["linear", "llama3", "yarn"] | None = None
    """How rotary frequencies are stretched for sequences longer than the original ones (Megatron's --use-rope-scaling
    is llama3)."""
    rope_scaling_factor: PositiveFloat = 8.0
    """By how much, at the most."""
    rope_scaling_original_length: PositiveInt = 8192
    """Sequence length before the stretch (llama3, yarn)."""
    rope_scaling_low_freq_factor: PositiveFloat = 1.0
    """Channels that turn less often than this over the original length are stretched in full (llama3)."""
    rope_scaling_high_freq_factor: PositiveFloat = 4.0
    """Channels that turn more often are left as they are (llama3)."""
    rope_scaling_beta_fast: PositiveFloat = 32.0
    """The same for yarn: turns from which on channels are left as they are."""
    rope_scaling_beta_slow: PositiveFloat = 1.0
    """Turns up to which channels are stretched in full (yarn)."""
    rope_scaling_attention_factor: PositiveFloat = 1.0
    """Multiplies the rotated queries and keys (yarn)."""
    window_size: tuple[int, ...] = ()
    """Sliding-window attention: how many positions a query sees to its left, itself not counted, and to its right,
    which must be 0."""
    window_attn_skip_freq: tuple[int, ...] = ()
    """Layers without the window: one number N, every N-th; or a number a layer, 1 with the window and 0 without; none:
    all have it."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm, throughout the model."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Norms before attention and MLP, after them (before the residual is added), or both."""
    apply_layernorm_1p: bool = False
    """Norm weights are stored less 1."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in every norm."""
    swiglu: bool = False
    """Gated MLP with silu."""
    gated_linear_unit: bool = False
    """Gated MLP with --activation."""
    activation: Literal["gelu", "gelu-tanh", "relu", "silu"] = "gelu"
    """Activation of the MLP without --swiglu."""
    add_bias_linear: bool = True
    """Biases in the linear layers (Megatron's --disable-bias-linear is --no-add-bias-linear)."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections even where add_bias_linear is off."""
    qk_layernorm: bool = False
    """Norm on each head's queries and keys."""
    qk_layernorm_across_heads: bool = False
    """With --qk-layernorm: one norm over the queries of all heads, and one over the keys."""
    softmax_scale: PositiveFloat | None = None
    """Multiplies the attention scores; none: 1 / sqrt(kv_channels)."""
    scale_embeddings: bool = False
    """Multiply the embeddings, not the tied output weights, by sqrt(hidden_size)."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer weights of its own, instead of the embedding's."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size."""
    vocab_size: PositiveInt | None = None
    """Real vocabulary size, without padding; none: the tokenizer's."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    attention_dropout: NonNegativeFloat = 0.0
    """Must be 0: scores and gradients come from two passes, which must see one function."""
    hidden_dropout: NonNegativeFloat = 0.0
    """Must be 0: scores and gradients come from two passes, which must see one function."""
    num_moe_experts: PositiveInt | None = None
    """Experts of a layer, in place of its MLP; none: no mixture."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Width of an expert; none: ffn_hidden_size, which is that of layers without experts."""
    moe_router_topk: PositiveInt = 2
    """Experts that a token goes to."""
    moe_router_pre_softmax: bool = False
    """Weigh a token's experts by their softmax over all experts; otherwise over those it goes to."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router's product; none: that of the weights. Its softmax is in float32 at least."""
    moe_layer_freq: tuple[int, ...] = ()
    """Layers with experts: one number N, every N-th from the first; or a number a layer, 1 with and 0 without; none:
    all."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Must be 0: a balancing loss would make the gradient depend on which responses share a microbatch."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Must be 0, for the same reason."""
    moe_expert_capacity_factor: PositiveFloat | None = None
    """Must be left out: dropped tokens would make responses depend on each other."""
    moe_router_enable_expert_bias: bool = False
    """Must be off: the biases move with counts of tokens, which both passes would feed."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers from Megatron-Core and PyTorch, or from Transformer Engine; auto: the latter where it is installed
    and the device is CUDA."""

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated: two halves of ``ffn_hidden_size``."""
        return self.swiglu or self.gated_linear_unit

    def __post_init__(self) -> None:
        # Written files give lists back.
        for name in ("window_size", "window_attn_skip_freq", "moe_layer_freq"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 1, has experts in place of an MLP."""
        marks = self.moe_layer_freq
        if self.num_moe_experts is None or not marks:
            return self.num_moe_experts is not None
        return (layer - 1) % marks[0] == 0 if len(marks) == 1 else bool(marks[layer - 1])

    def has_window(self, layer: int) -> bool:
        """Whether a layer, counted from 1, attends within ``window_size``."""
        marks = self.window_attn_skip_freq
        if not self.window_size or not marks:
            return bool(self.window_size)
        return layer % marks[0] != 0 if len(marks) == 1 else bool(marks[layer - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The layout. Data-parallel size is world size / (tensor x pipeline x context)."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline stage (interleaved schedule); none: one, not interleaved."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a mixture, taken from the data- and context-parallel ones."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "alltoall"
    """How tokens reach their experts on other ranks."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward of the last microbatch still runs."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's updated weights layer by layer, while the next forward runs."""
    ddp_bucket_size: PositiveInt | None = None
    """Parameters reduced (and gathered) at a time, with overlap; none: max(40e6, 1e6 x data-parallel size)."""
    distributed_timeout_minutes: PositiveInt = 10
    """A collective that waits longer ends the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if the node has a GPU for each of its ranks, else the CPU with gloo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """Number formats, recomputation, and the log-probability computation."""

    bf16: bool = False
    """Weights and activations in bf16, with fp32 master weights; otherwise fp32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 matrix products (Transformer Engine); hybrid: e4m3 forward, e5m2 for gradients."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] | None = None
    """How FP8 scales are chosen; needed with fp8_format. delayed: from the maxima of the steps before; tensorwise: of
    the tensor at hand; blockwise, mxfp8: of blocks of it."""
    fp8_param_gather: bool = False
    """Keep the linear layers' weights in FP8 alone, and gather them so; what they are quantized from is in the
    distributed optimizer."""
    fp8_margin: NonNegativeInt = 0
    """Delayed scaling leaves a factor of 2 to the power of this above the largest value seen."""
    fp8_amax_history_len: PositiveInt = 16
    """Delayed scaling: optimizer steps whose maxima are remembered."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Delayed scaling: the largest value of those steps, or of the last one alone."""
    first_last_layers_bf16: bool = False
    """With FP8: the first and the last layers stay in bf16."""
    num_layers_at_start_in_bf16: NonNegativeInt = 1
    """How many at the start."""
    num_layers_at_end_in_bf16: NonNegativeInt = 1
    """How many at the end."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """flash, fused (cuDNN), unfused: Transformer Engine's; local: PyTorch's scaled dot-product attention, with either
    kind of layers; auto: Transformer Engine's choice in its layers, else local."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the fp32 buffers inside the matrix product: Transformer Engine's layers, or local ones
    with Apex's fused_weight_gradient_mlp_cuda."""
    apply_rope_fusion: bool = False
    """Rotate queries and keys with Transformer Engine's kernel."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward: whole layers, or the core attention only."""
    recompute_method: Literal["uniform", "block"] | None = None
    """For full: uniform recomputes in units of recompute_num_layers layers; block, the first so many of a stage."""
    recompute_num_layers: PositiveInt | None = None
    """For full: see recompute_method."""
    deterministic_mode: bool = False
    """Only kernels that give the same bits every time."""
    log_probs_chunk_size: PositiveInt = 1024
    """Response tokens whose logits exist at one time; bounds memory at this x local vocabulary."""
    fused_logprobs: Literal["auto", "on", "off"] = "auto"
    """Log-probabilities and their gradient from the logits by Triton kernels; auto: on a GPU that has Triton."""
    cuda_graphs: bool = False
    """Capture each layer's forward and backward as CUDA graphs, one set per shape of a microbatch, for both passes."""
    cuda_graph_shapes: PositiveInt = 4
    """Shapes that are captured, the first that a rank meets; further ones run without graphs."""
    cuda_graph_length_multiple: PositiveInt = 512
    """With --cuda-graphs, microbatches are padded to a multiple of this, at most to seq_length: shapes must repeat."""
