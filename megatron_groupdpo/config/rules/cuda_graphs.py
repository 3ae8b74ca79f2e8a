"""What does not go with CUDA graphs of layers, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_groupdpo.config.sections.train_config import TrainConfig


def graph_problems(config: TrainConfig) -> Iterator[str]:
    """One message for each option that ``cuda_graphs`` excludes."""
    precision, parallel, training = config.precision, config.parallel, config.training
    if not precision.cuda_graphs:
        return
    if parallel.device == "cpu":
        yield "cuda_graphs needs a GPU and device is 'cpu'; leave it out, or set device to cuda."
    if training.max_tokens_per_microbatch is not None:
        yield (
            f"cuda_graphs repeats kernels on fixed shapes, and packed microbatches (max_tokens_per_microbatch "
            f"{training.max_tokens_per_microbatch}) have other bounds every time; use micro_batch_size, or leave "
            "cuda_graphs out."
        )
    if parallel.pipeline_model_parallel_size > 1:
        yield (
            f"cuda_graphs keeps one microbatch's activations a layer, and a pipeline (pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size}) has several in flight; set it to 1, or leave cuda_graphs out."
        )
    if parallel.context_parallel_size > 1:
        yield (
            f"cuda_graphs was never tried on attention across ranks (context_parallel_size "
            f"{parallel.context_parallel_size}); set it to 1, or leave cuda_graphs out."
        )
    if precision.recompute_granularity is not None:
        yield (
            f"recompute_granularity ({precision.recompute_granularity}) frees nothing with cuda_graphs, whose memory "
            "holds a layer's activations between replays; leave one of them out."
        )
    if config.model.num_moe_experts is not None:
        yield (
            f"cuda_graphs repeats fixed shapes, and experts (num_moe_experts {config.model.num_moe_experts}) wait on "
            "the host for how many tokens each has; leave cuda_graphs out."
        )
    if precision.fp8_format is not None:
        yield (
            f"cuda_graphs does not go with fp8_format ({precision.fp8_format}): Transformer Engine decides about "
            "scales and quantized weights in Python between kernels; leave one of them out."
        )
    if precision.gradient_accumulation_fusion:
        yield (
            "cuda_graphs does not go with gradient_accumulation_fusion, whose backward marks in Python which gradients "
            "are in the buffers already; leave one of them out."
        )
    if parallel.overlap_param_gather:
        yield (
            "cuda_graphs does not go with overlap_param_gather, which waits for weights in hooks of the modules, and "
            "no Python runs in a replayed layer; leave one of them out."
        )
