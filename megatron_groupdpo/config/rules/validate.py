"""What fields must be together. Every message states the rule, the values and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from megatron_groupdpo.config.coerce import coerce
from megatron_groupdpo.config.derived import (
    lr_decay_iters,
    lr_warmup_iters,
    model_ranks,
    objective_hyperparameters,
    train_iters,
)
from megatron_groupdpo.config.fp8 import length_multiple
from megatron_groupdpo.config.options import options
from megatron_groupdpo.config.rules.cuda_graphs import graph_problems
from megatron_groupdpo.config.rules.export import export_problems
from megatron_groupdpo.config.rules.fp8 import fp8_option_problems, fp8_problems, kernel_problems
from megatron_groupdpo.config.rules.idle import idle_problems
from megatron_groupdpo.config.rules.mixture import expert_ranks_problems, mixture_problems
from megatron_groupdpo.config.rules.speed import speed_problems
from megatron_groupdpo.config.sections.machine import ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.sections.train_config import TrainConfig
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.objectives import get_objective, hyperparameters_for


def validate(config: TrainConfig, world_size: int) -> None:
    """Refuse a configuration whose fields contradict each other, the world size, or what is built.

    Raises:
        ConfigError: all contradictions at once, one per line.
    """
    # Fields first: the rules below may then rely on types and ranges, also of a config made in Python.
    problems = list(_field_problems(config))
    if not problems:
        problems = [
            *_layout_problems(config, world_size),
            *_model_problems(config),
            *_rope_problems(config),
            *_window_problems(config),
            *mixture_problems(config, world_size),
            *_precision_problems(config),
            *_objective_problems(config),
            *_length_problems(config),
            *_optimizer_problems(config),
            *_data_problems(config),
            *_checkpoint_problems(config),
            *speed_problems(config),
            *graph_problems(config),
            *export_problems(config.checkpoint),
            *idle_problems(config),
        ]
    _refuse(problems)


def validate_machine(parallel: ParallelConfig, precision: PrecisionConfig, world_size: int) -> None:
    """The same rules for a command that has a layout and a precision and no other section, before it knows its model.

    Raises:
        ConfigError: all contradictions at once, one per line.
    """
    _refuse(
        [
            *_ranks_problems(parallel, world_size),
            *(expert_ranks_problems(parallel, world_size) if parallel.expert_model_parallel_size > 1 else ()),
            *fp8_option_problems(precision, parallel),
            *idle_problems(SimpleNamespace(precision=precision), only=_ALONE),
        ]
    )


_ALONE = tuple(
    f"precision.{name}"
    for name in ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
)
"""Fields that are idle, or not, by their own section alone."""


def _refuse(problems: Sequence[str]) -> None:
    if len(problems) > 1:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the configuration has {len(problems)} problems:\n{listed}")
    if problems:
        raise ConfigError(problems[0])


def _field_problems(config: TrainConfig) -> Iterator[str]:
    for option in options(TrainConfig):
        value = getattr(getattr(config, option.section), option.name)
        try:
            coerce(value, option.hint, where=f"{option.name!r} in {option.section!r}", choices=option.choices)
        except ConfigError as error:
            yield str(error)


def _ranks_problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ranks = model_ranks(parallel)
    if world_size % ranks:
        yield (
            f"world size ({world_size}) must be a multiple of tensor ({tp}) x pipeline ({pp}) x context ({cp}) "
            f"parallel size = {ranks}; start a multiple of {ranks} ranks or lower one of the sizes."
        )
    if parallel.sequence_parallel and tp == 1:
        yield (
            "sequence_parallel splits over the tensor-parallel ranks and tensor_model_parallel_size is 1; turn it "
            "off or raise tensor_model_parallel_size."
        )


def _layout_problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, chunks = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size
    yield from _ranks_problems(parallel, world_size)
    if model.num_attention_heads % tp:
        yield (
            f"num_attention_heads ({model.num_attention_heads}) must be a multiple of "
            f"tensor_model_parallel_size ({tp}); choose a size that divides the heads."
        )
    groups = model.num_query_groups or model.num_attention_heads
    if groups % tp and tp % groups:
        yield (
            f"num_query_groups ({groups}) must be a multiple or a divisor of tensor_model_parallel_size ({tp}); "
            f"choose another tensor_model_parallel_size."
        )
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    if ffn % tp:
        yield f"ffn_hidden_size ({ffn}) must be a multiple of tensor_model_parallel_size ({tp}); choose another size."
    if chunks is not None and (pp == 1 or chunks == 1):
        yield (
            f"virtual_pipeline_model_parallel_size ({chunks}) must be >= 2 with pipeline_model_parallel_size "
            f"({pp}) >= 2; leave it out for a schedule that is not interleaved."
        )
    if model.num_layers % (pp * (chunks or 1)):
        stages = f"pipeline_model_parallel_size ({pp})" + (f" x virtual chunks ({chunks})" if chunks else "")
        yield f"num_layers ({model.num_layers}) must be a multiple of {stages}; choose sizes that divide it."
    multiple = length_multiple(parallel, config.precision)
    if config.data.seq_length % multiple:
        fp8 = f", FP8 {config.precision.fp8_recipe} needs whole tiles a rank" if config.precision.fp8_format else ""
        yield (
            f"seq_length ({config.data.seq_length}) must be a multiple of {multiple}: context parallelism cuts a "
            f"sequence in 2 x {cp}, sequence parallelism in {tp}{fp8}; "
            f"try {-(-config.data.seq_length // multiple) * multiple}."
        )
    budget = config.training.max_tokens_per_microbatch
    if budget is not None and budget < config.data.seq_length:
        yield (
            f"max_tokens_per_microbatch ({budget}) must hold a response of seq_length ({config.data.seq_length}) "
            f"tokens; raise the former or lower the latter."
        )


def _model_problems(config: TrainConfig) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"hidden_size ({model.hidden_size}) must be a multiple of num_attention_heads ({heads}); change one, "
            f"or give the width of a head as kv_channels."
        )
    if groups is not None and heads % groups:
        yield (
            f"num_attention_heads ({heads}) must be a multiple of num_query_groups ({groups}); choose a number of "
            f"groups that divides the heads."
        )
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(model, name) != 0:
            yield (
                f"{name} must be 0, it is {getattr(model, name)}: the scoring pass and the gradient pass must see one "
                f"function; remove it."
            )
    if model.max_position_embeddings < config.data.seq_length:
        yield (
            f"max_position_embeddings ({model.max_position_embeddings}) must be >= seq_length "
            f"({config.data.seq_length}); raise the former or lower the latter."
        )
    if model.qk_layernorm_across_heads and model.normalization != "RMSNorm":
        yield f"qk_layernorm_across_heads needs normalization RMSNorm, it is {model.normalization}; change one."
    if model.transformer_impl == "transformer_engine" and config.parallel.device == "cpu":
        yield "transformer_impl 'transformer_engine' needs CUDA and device is 'cpu'; use local or auto."


def _rope_problems(config: TrainConfig) -> Iterator[str]:
    model = config.model
    for low, high in (
        ("rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor"),
        ("rope_scaling_beta_slow", "rope_scaling_beta_fast"),
    ):
        if not getattr(model, low) < getattr(model, high):
            yield f"{low} ({getattr(model, low):g}) must be < {high} ({getattr(model, high):g}); exchange them."
    if model.rope_scaling_type == "yarn" and model.rotary_percent != 1:
        yield f"rope_scaling_type 'yarn' is built for rotary_percent 1, it is {model.rotary_percent:g}; set it to 1."


def _window_problems(config: TrainConfig) -> Iterator[str]:
    window, layers = config.model.window_size, config.model.window_attn_skip_freq
    num_layers = config.model.num_layers
    if window and (len(window) != 2 or window[0] < 0 or window[1] != 0):
        yield (
            f"window_size ({_listed(window)}) must be the positions seen to the left, >= 0, and to the right, 0; for a "
            "window of W tokens give W - 1 and 0."
        )
    if len(layers) == 1 and layers[0] < 2:
        yield f"window_attn_skip_freq ({layers[0]}) must be >= 2: every N-th layer has no window; leave it out for all."
    if len(layers) > 1 and (len(layers) != num_layers or {*layers} != {0, 1}):
        yield (
            f"window_attn_skip_freq ({_listed(layers)}) must be one number, or num_layers ({num_layers}) numbers, some "
            "1 (with the window) and some 0."
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def _precision_problems(config: TrainConfig) -> Iterator[str]:
    precision = config.precision
    yield from fp8_problems(config)
    yield from kernel_problems(config)
    full = precision.recompute_granularity == "full"
    for name in ("recompute_method", "recompute_num_layers"):
        given = getattr(precision, name) is not None
        if full and not given:
            yield f"recompute_granularity 'full' needs {name}; for all layers: recompute_method uniform, 1 layer."
        if given and not full:
            yield (
                f"{name} acts only with recompute_granularity 'full', which is "
                f"{precision.recompute_granularity or 'none'}; remove it or set full."
            )


def _objective_problems(config: TrainConfig) -> Iterator[str]:
    options = config.objective
    objective = get_objective(options.objective)
    try:
        hyperparameters_for(objective.name, objective_hyperparameters(options))
    except ConfigError as error:
        yield str(error)
    if objective.needs_reference and options.reference == "none":
        yield (
            f"objective {objective.name!r} compares with a reference model and reference is 'none'; use cached, or "
            f"an objective without one."
        )
    if not objective.needs_reference and options.reference != "none":
        yield f"objective {objective.name!r} reads no reference and reference is {options.reference!r}; set it to none."
    if objective.needs_reference and options.reference == "cached" and options.reference_logprobs is None:
        yield "reference 'cached' needs reference_logprobs, the store of reference log-probabilities; give its path."
    if objective.needs_score_average and not options.score_average:
        yield f"objective {objective.name!r} is defined on scores averaged over tokens; set score_average to true."
    if objective.name == "sft" and options.nll_coeff == 0:
        yield "objective 'sft' is the NLL alone and nll_coeff is 0; set nll_coeff to 1."


def _length_problems(config: TrainConfig) -> Iterator[str]:
    training, optimizer = config.training, config.optimizer
    if (training.micro_batch_size is None) == (training.max_tokens_per_microbatch is None):
        yield (
            f"exactly one of micro_batch_size ({_shown(training.micro_batch_size)}) and max_tokens_per_microbatch "
            f"({_shown(training.max_tokens_per_microbatch)}) must be given."
        )
    if (training.train_iters is None) == (training.train_samples is None):
        yield (
            f"exactly one of train_iters ({_shown(training.train_iters)}) and train_samples "
            f"({_shown(training.train_samples)}) must be given."
        )
        return
    if train_iters(config) == 0:
        yield (
            f"train_samples ({training.train_samples}) must be at least global_batch_size "
            f"({training.global_batch_size}); both count prompts."
        )
        return
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        yield "lr_warmup_iters and lr_warmup_fraction exclude each other; remove one."
    end = min(train_iters(config), lr_decay_iters(config))
    if lr_warmup_iters(config) >= end:
        yield (
            f"warm-up ({lr_warmup_iters(config)} iterations) must end before the decay ({lr_decay_iters(config)}) and "
            f"the run ({train_iters(config)}); try lr_warmup_iters {end // 10}."
        )


def _optimizer_problems(config: TrainConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield f"min_lr ({optimizer.min_lr:g}) must be <= lr ({optimizer.lr:g}); lower it."
    if optimizer.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        yield "Megatron-Core's distributed optimizer runs Adam and optimizer is 'sgd'; use adam, or turn it off."


def _data_problems(config: TrainConfig) -> Iterator[str]:
    data, training = config.data, config.training
    if not data.data_path:
        yield "data_path must name at least one token store."
    numbers = [path for path in data.data_path if path.replace(".", "", 1).isdigit()]
    if numbers:
        yield (
            f"data_path holds {numbers[0]!r}, which is no token store; weights go into data_weights, one for each "
            f"store."
        )
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        yield (
            f"data_weights has {len(data.data_weights)} entries and data_path {len(data.data_path)}; give one weight "
            f"for each store, or none."
        )
    if data.valid_data_path and data.valid_fraction:
        yield (
            f"valid_data_path and valid_fraction ({data.valid_fraction}) exclude each other; keep one source of "
            f"validation data."
        )
    has_validation = bool(data.valid_data_path or data.valid_fraction)
    if has_validation and training.eval_interval is None:
        yield "validation data are given and eval_interval is not; set eval_interval, or remove the data."
    if training.eval_interval is not None and not has_validation:
        yield f"eval_interval ({training.eval_interval}) needs valid_data_path or valid_fraction; give one of them."


def _checkpoint_problems(config: TrainConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.save_interval is not None and checkpoint.save is None:
        yield f"save_interval ({checkpoint.save_interval}) needs save, the folder to write to; give it."
    if checkpoint.load is None:
        for name in ("finetune", "no_load_optim", "exit_on_missing_checkpoint"):
            if getattr(checkpoint, name):
                yield f"{name} acts on load, which is not given; give load, or remove {name}."


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
