"""Fields that act on nothing beside others: set there, they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from megatron_groupdpo.config.options import options
from megatron_groupdpo.config.sections.train_config import TrainConfig
from megatron_groupdpo.objectives import get_objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """Fields that act on nothing under a condition: set to other than their default, they are refused there."""

    fields: tuple[str, ...]
    when: Callable[[TrainConfig], bool]
    because: str


IDLE = (
    Idle(
        fields=(
            "model.rotary_base",
            "model.rotary_percent",
            "model.rotary_base_local",
            "model.rope_scaling_type",
        ),
        when=lambda c: c.model.position_embedding_type != "rope",
        because="position_embedding_type is not rope",
    ),
    Idle(
        fields=("model.rotary_base_local",),
        when=lambda c: not c.model.window_size,
        because="there is no window_size",
    ),
    Idle(
        fields=("model.rope_scaling_factor",),
        when=lambda c: c.model.rope_scaling_type is None,
        because="there is no rope_scaling_type",
    ),
    Idle(
        fields=("model.rope_scaling_original_length",),
        when=lambda c: c.model.rope_scaling_type not in ("llama3", "yarn"),
        because="rope_scaling_type is neither llama3 nor yarn",
    ),
    Idle(
        fields=("model.rope_scaling_low_freq_factor", "model.rope_scaling_high_freq_factor"),
        when=lambda c: c.model.rope_scaling_type != "llama3",
        because="rope_scaling_type is not llama3",
    ),
    Idle(
        fields=(
            "model.rope_scaling_beta_fast",
            "model.rope_scaling_beta_slow",
            "model.rope_scaling_attention_factor",
        ),
        when=lambda c: c.model.rope_scaling_type != "yarn",
        because="rope_scaling_type is not yarn",
    ),
    Idle(
        fields=("model.qk_layernorm_across_heads",),
        when=lambda c: not c.model.qk_layernorm,
        because="qk_layernorm is off",
    ),
    Idle(
        fields=("model.window_attn_skip_freq",),
        when=lambda c: not c.model.window_size,
        because="there is no window_size",
    ),
    Idle(fields=("model.gated_linear_unit",), when=lambda c: c.model.swiglu, because="swiglu is gated already"),
    Idle(fields=("model.activation",), when=lambda c: c.model.swiglu, because="swiglu uses silu"),
    Idle(
        fields=("optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps"),
        when=lambda c: c.optimizer.optimizer != "adam",
        because="optimizer is not adam",
    ),
    Idle(
        fields=("optimizer.sgd_momentum",),
        when=lambda c: c.optimizer.optimizer != "sgd",
        because="optimizer is not sgd",
    ),
    Idle(
        fields=("optimizer.min_lr", "optimizer.lr_decay_iters"),
        when=lambda c: c.optimizer.lr_decay_style == "constant",
        because="lr_decay_style is constant",
    ),
    Idle(
        fields=("objective.nll_average", "objective.one_sided_nll"),
        when=lambda c: c.objective.nll_coeff == 0,
        because="nll_coeff is 0",
    ),
    Idle(
        fields=("objective.beta", "objective.score_average", "objective.one_sided_nll"),
        when=lambda c: c.objective.objective == "sft",
        because="objective 'sft' has no preference term",
    ),
    Idle(
        fields=("objective.reference_logprobs", "objective.reference_probe_groups"),
        when=lambda c: c.objective.reference != "cached",
        because="reference is not cached",
    ),
    Idle(
        fields=("objective.reference_offload",),
        when=lambda c: c.objective.reference != "resident",
        because="reference is not resident",
    ),
    Idle(
        fields=("precision.first_last_layers_bf16", "precision.fp8_param_gather"),
        when=lambda c: c.precision.fp8_format is None,
        because="fp8_format is not set",
    ),
    Idle(
        fields=("precision.num_layers_at_start_in_bf16", "precision.num_layers_at_end_in_bf16"),
        when=lambda c: not c.precision.first_last_layers_bf16,
        because="first_last_layers_bf16 is off",
    ),
    Idle(
        fields=("precision.fp8_margin", "precision.fp8_amax_history_len", "precision.fp8_amax_compute_algo"),
        when=lambda c: c.precision.fp8_recipe != "delayed",
        because="fp8_recipe is not delayed",
    ),
    Idle(
        fields=("precision.apply_rope_fusion",),
        when=lambda c: c.model.position_embedding_type != "rope",
        because="position_embedding_type is not rope",
    ),
    Idle(
        fields=("precision.cuda_graph_shapes", "precision.cuda_graph_length_multiple"),
        when=lambda c: not c.precision.cuda_graphs,
        because="cuda_graphs is off",
    ),
    Idle(
        fields=("data.tokenizer_type",),
        when=lambda c: c.data.tokenizer_model is None,
        because="tokenizer_model is not set",
    ),
    Idle(
        fields=("training.eval_iters",),
        when=lambda c: c.training.eval_interval is None,
        because="eval_interval is not set",
    ),
    Idle(
        fields=("training.gradient_tolerance",),
        when=lambda c: c.training.verify_gradients == 0,
        because="verify_gradients is 0",
    ),
    Idle(
        fields=("logging.profile_step_start", "logging.profile_step_end"),
        when=lambda c: not c.logging.profile,
        because="profile is off",
    ),
    Idle(
        fields=("training.score_drift_threshold",),
        when=lambda c: get_objective(c.objective.objective).separable,
        because="a separable objective has no scoring pass to drift from",
    ),
)


def idle_problems(config: Any, *, only: Sequence[str] | None = None) -> Iterator[str]:
    """One message for each field that is set and would act on nothing.

    Args:
        config: a TrainConfig; with ``only``, anything with the sections that these fields need.
        only: ``section.field``; None: all.
    """
    defaults = {f"{option.section}.{option.name}": option.default for option in options(TrainConfig)}
    for idle in IDLE:
        asked = idle.fields if only is None else [field for field in idle.fields if field in only]
        if asked and idle.when(config):
            for field in asked:
                if (value := attrgetter(field)(config)) != defaults[field]:
                    yield f"{field.split('.')[1]} ({value}) would act on nothing: {idle.because}; remove it."
