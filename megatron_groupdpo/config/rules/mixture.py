"""Mixtures of experts: what their fields must be, alone and with the layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_groupdpo.config.sections.machine import ModelConfig, ParallelConfig
from megatron_groupdpo.config.sections.train_config import TrainConfig
from megatron_groupdpo.errors import ConfigError

_REFUSED = {
    "moe_aux_loss_coeff": "the balancing loss of a token depends on which tokens share its microbatch, so the gradient "
    "would depend on the layout, and the scoring pass cannot know its coefficient",
    "moe_z_loss_coeff": "it is averaged over a microbatch, so the gradient would depend on the layout",
    "moe_expert_capacity_factor": "tokens dropped for others in the microbatch make a response's log-probability "
    "depend on its neighbours",
    "moe_router_enable_expert_bias": "the biases move with counts of tokens, which both passes and padding would feed",
}
"""Fields that must keep their defaults, and why."""


def mixture_problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    """What is wrong with a run's mixture."""
    parallel = config.parallel
    yield from _problems(config.model, parallel, training=True)
    if config.model.num_moe_experts is not None:
        yield from expert_ranks_problems(parallel, world_size)


def expert_ranks_problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """Whether the ranks can share out the experts."""
    ep = parallel.expert_model_parallel_size
    shared = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % (shared * ep):
        yield (
            f"world size ({world_size}) must be a multiple of tensor x pipeline x expert parallel size = "
            f"{shared * ep}: expert_model_parallel_size ({ep}) must divide the data- and context-parallel ranks "
            f"({world_size} / {shared}); start more ranks or lower one of the sizes."
        )


def check_mixture(model: ModelConfig, parallel: ParallelConfig, *, training: bool) -> None:
    """The same for a model that does not come from a run's configuration.

    Raises:
        ConfigError: the first problem.
    """
    for problem in _problems(model, parallel, training=training):
        raise ConfigError(problem)


def _problems(model: ModelConfig, parallel: ParallelConfig, *, training: bool) -> list[str]:
    # The rules of the layout rely on those of the model.
    return list(_model_problems(model)) or list(_layout_problems(model, parallel, training=training))


def _model_problems(model: ModelConfig) -> Iterator[str]:
    experts, topk = model.num_moe_experts, model.moe_router_topk
    for name, reason in _REFUSED.items():
        if getattr(model, name):
            yield f"{name} ({getattr(model, name)}) is refused: {reason}; remove it."
    if experts is None:
        defaults = {field.name: field.default for field in fields(ModelConfig) if field.name.startswith("moe_")}
        for name, default in defaults.items():
            if getattr(model, name) != default and name not in _REFUSED:
                yield f"{name} ({getattr(model, name)}) would act on nothing: num_moe_experts is not given; remove it."
        return
    if topk > experts:
        yield f"moe_router_topk ({topk}) must be <= num_moe_experts ({experts}); lower it."
    if topk == 1 and not model.moe_router_pre_softmax:
        yield (
            "moe_router_topk 1 without moe_router_pre_softmax weighs the one expert by 1, so the router would have no "
            "gradient; set moe_router_pre_softmax, or a larger moe_router_topk."
        )
    if model.add_bias_linear:
        yield "experts are built without biases and add_bias_linear is on; set --no-add-bias-linear."
    marks = model.moe_layer_freq
    if len(marks) > 1 and (len(marks) != model.num_layers or {*marks} - {0, 1} or not any(marks)):
        yield (
            f"moe_layer_freq ({' '.join(map(str, marks))}) must be one number, or num_layers ({model.num_layers}) "
            "numbers, 1 for a layer with experts and 0 for one without, some of them 1."
        )
    if len(marks) == 1 and marks[0] < 1:
        yield f"moe_layer_freq ({marks[0]}) must be >= 1: every N-th layer has experts; leave it out for all."


def _layout_problems(model: ModelConfig, parallel: ParallelConfig, *, training: bool) -> Iterator[str]:
    experts, ep, tp = model.num_moe_experts, parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    if experts is None:
        if ep > 1:
            yield (
                f"expert_model_parallel_size ({ep}) shares the experts of a mixture and num_moe_experts is not given; "
                "set it to 1."
            )
        if parallel.moe_token_dispatcher_type != "alltoall":
            yield (
                f"moe_token_dispatcher_type ({parallel.moe_token_dispatcher_type}) would act on nothing: "
                "num_moe_experts is not given; remove it."
            )
        return
    if experts % ep:
        yield f"num_moe_experts ({experts}) must be a multiple of expert_model_parallel_size ({ep}); choose a divisor."
    stages = _stages_without_experts(model, parallel)
    if stages:
        yield (
            f"pipeline stage {stages[0] + 1} of {parallel.pipeline_model_parallel_size} would have no layer with "
            "experts (moe_layer_freq), and Megatron's optimizer waits for each stage's; choose another pipeline size."
        )
    ffn = model.moe_ffn_hidden_size or model.ffn_hidden_size or 4 * model.hidden_size
    if ffn % tp:
        yield (
            f"moe_ffn_hidden_size ({ffn}) must be a multiple of tensor_model_parallel_size ({tp}); choose another size."
        )
    if training and tp > 1 and not parallel.sequence_parallel:
        yield (
            f"a mixture of experts on tensor_model_parallel_size {tp} needs sequence_parallel: without it every rank "
            "would send the same tokens to the experts; add --sequence-parallel."
        )


def _stages_without_experts(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Pipeline stages, from 0; a stage has every ``pipeline size``-th run of layers."""
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    per_chunk = max(1, model.num_layers // (pp * chunks))
    with_experts = {layer // per_chunk % pp for layer in range(model.num_layers) if model.has_experts(layer + 1)}
    return [stage for stage in range(pp) if stage not in with_experts]
