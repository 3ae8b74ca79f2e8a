"""FP8 and fused kernels: which options go together, and what they ask of the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_groupdpo.config.fp8 import TILE
from megatron_groupdpo.config.sections.machine import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.sections.train_config import TrainConfig


def fp8_option_problems(precision: PrecisionConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What FP8 asks of its own section, and of the device."""
    recipe = precision.fp8_recipe
    if precision.fp8_format is None:
        if recipe is not None:
            yield f"fp8_recipe ({recipe}) is set and fp8_format is not; add fp8_format e4m3 or hybrid."
        return
    if recipe is None:
        yield "fp8_format is set and fp8_recipe is not; choose tensorwise, blockwise, delayed or mxfp8."
        return
    if not precision.bf16:
        yield "fp8_format needs bf16: FP8 is used inside matrix products only; add --bf16."
    if parallel.device == "cpu":
        yield "fp8_format needs a GPU and device is 'cpu'; leave it out, or set device to cuda."
    if precision.first_last_layers_bf16 and recipe == "delayed":
        yield (
            "first_last_layers_bf16 does not go with fp8_recipe 'delayed': Transformer Engine collects the maxima of "
            "one FP8 region a pass, which layers in bf16 would cut into several; use tensorwise, or leave it out."
        )


def fp8_problems(config: TrainConfig) -> Iterator[str]:
    """What FP8 asks of the other fields."""
    precision, recipe = config.precision, config.precision.fp8_recipe
    yield from fp8_option_problems(precision, config.parallel)
    if precision.fp8_format is None or recipe is None:
        return
    if config.model.transformer_impl == "local":
        yield "fp8_format needs Transformer Engine and transformer_impl is 'local'; use auto or transformer_engine."
    if precision.first_last_layers_bf16:
        bf16_layers = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
        if bf16_layers >= config.model.num_layers:
            yield (
                f"num_layers_at_start_in_bf16 + num_layers_at_end_in_bf16 ({bf16_layers}) leave none of num_layers "
                f"({config.model.num_layers}) to FP8; lower them, or leave fp8_format out."
            )
    if precision.fp8_param_gather and not config.parallel.use_distributed_optimizer:
        yield (
            "fp8_param_gather needs use_distributed_optimizer, whose fp32 copies the FP8 weights are quantized from; "
            "add --use-distributed-optimizer, or leave it out."
        )
    if precision.fp8_param_gather and recipe == "mxfp8":
        yield (
            "fp8_param_gather does not go with fp8_recipe 'mxfp8', whose two copies of a weight, by rows and by "
            "columns, are rounded apart, so that one cannot be gathered for both; use another recipe, or leave it out."
        )
    if config.objective.reference_offload and recipe == "delayed":
        yield (
            "reference_offload does not go with fp8_recipe 'delayed': the reference is scored in bf16, and offloaded "
            "it would use the policy's FP8 layers; leave it out, or use another recipe."
        )
    if config.training.verify_gradients and config.training.gradient_tolerance is None:
        yield (
            "verify_gradients needs gradient_tolerance with FP8: none was measured yet; give one (bf16 has 1e-1), or "
            "set verify_gradients to 0."
        )
    for name, size in linear_sizes(config.model, config.parallel).items():
        if size % TILE[recipe]:
            yield (
                f"fp8_recipe {recipe!r} needs linear layers whose sizes on a rank are multiples of {TILE[recipe]}: "
                f"{name} has {size}; change the model or tensor_model_parallel_size, or leave fp8_format out."
            )


def linear_sizes(model: ModelConfig, parallel: ParallelConfig) -> dict[str, int]:
    """Dimensions of the linear layers' weights on one tensor-parallel rank, by name; biases and norms stay in bf16."""
    tp = parallel.tensor_model_parallel_size
    heads = model.num_attention_heads
    head = model.kv_channels or model.hidden_size // heads
    groups = model.num_query_groups or heads
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    experts = {}
    if model.num_moe_experts is not None:
        experts["moe_ffn_hidden_size"] = (model.moe_ffn_hidden_size or ffn) // tp
    return {
        "hidden_size": model.hidden_size,
        "queries, keys and values together": (heads // tp + 2 * max(1, groups // tp)) * head,
        "the attention's output": heads // tp * head,
        "ffn_hidden_size": ffn // tp,
        **experts,
    }


def kernel_problems(config: TrainConfig) -> Iterator[str]:
    """Options of Transformer Engine's layers, where it is known already that there are none."""
    precision = config.precision
    local = config.model.transformer_impl == "local" or config.parallel.device == "cpu"
    reason = "device is 'cpu'" if config.parallel.device == "cpu" else "transformer_impl is 'local'"
    if precision.attention_backend in ("flash", "fused", "unfused") and local:
        yield (
            f"attention_backend {precision.attention_backend!r} is Transformer Engine's and {reason}; use auto or "
            f"local."
        )
    if precision.attention_backend in ("flash", "fused") and not precision.bf16:
        yield f"attention_backend {precision.attention_backend!r} needs bf16; add --bf16, or use auto."
    if precision.attention_backend == "unfused" and config.parallel.context_parallel_size > 1:
        yield (
            f"attention_backend 'unfused' has no context parallelism (context_parallel_size "
            f"{config.parallel.context_parallel_size}); use auto, fused or local."
        )
    if (
        precision.apply_rope_fusion
        and precision.attention_backend == "local"
        and config.training.max_tokens_per_microbatch is not None
    ):
        yield (
            "apply_rope_fusion reads the bounds of packed responses on the GPU, attention_backend 'local' on the host; "
            "leave one of them out, or max_tokens_per_microbatch."
        )
    if precision.gradient_accumulation_fusion and config.parallel.device == "cpu":
        yield "gradient_accumulation_fusion needs a GPU and device is 'cpu'; leave it out."
