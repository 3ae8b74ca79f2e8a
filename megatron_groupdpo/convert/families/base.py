"""What a model family declares, and the words for saying that a configuration is not one of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.config.options import did_you_mean
from megatron_groupdpo.convert.families.transforms import COPY, Transform
from megatron_groupdpo.errors import ConfigError

HfConfig = Mapping[str, Any]
"""``config.json`` as the family's configuration class reads it: every field present, RoPE in ``rope_parameters``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Where Hugging Face keeps one Megatron tensor."""

    hf: tuple[str, ...]
    """Tensor names, ``{layer}`` standing for the layer's number and ``{expert}`` for the expert's."""
    transform: Transform = COPY


def rule(*hf: str, transform: Transform = COPY) -> Rule:
    """A :class:`Rule`, written short."""
    return Rule(hf, transform)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of ``transformers`` and its place in Megatron."""

    name: str
    architecture: str
    """``architectures[0]`` in config.json."""
    model_type: str
    rules: Mapping[str, Rule]
    """By Megatron's name (``tensors/megatron_names.py``). Rules for tensors that a given model lacks do not apply."""
    to_model: Callable[[HfConfig], ModelConfig]
    """Raises ConfigError naming the field that ModelConfig cannot express."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """config.json without token ids and dtype. Raises ConfigError naming the field that the family lacks."""
    prefix: str
    """What the names of the inner model's tensors start with, and may lack in files saved without the head."""
    ignorable: tuple[str, ...] = ()
    """Regular expressions of tensors that hold no parameter (buffers of old versions)."""
    tied_copies: Mapping[str, str] = field(default_factory=dict)
    """Copies that a file of a model with tied embeddings may hold, and what each is a copy of."""
    wrapper: str | None = None
    """Architecture of a model that holds this one beside others (a vision tower), configured by its ``text_config``."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of tensor names that files may spell otherwise (those of a wrapper): the rules' spelling and the other."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors of all experts, [expert, rows, columns], that files may hold instead: how the name ends, and how the
    rules' names end of the parts that share its rows."""
    reads: tuple[str, ...]
    """Fields of config.json that ``to_model`` honours or refuses itself, or ``transformers`` for it."""
    harmless: Mapping[str, str] = field(default_factory=dict)
    """Fields that change no log-probability, and why, beside :data:`HARMLESS`."""
    wrapper_reads: tuple[str, ...] = ()
    """Fields of a wrapper's own configuration that are known to leave the model inside alone."""


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "sliding_window": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (1.0, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "use_mrope": (False, None),
}
"""Fields of any family that would change the model, and the values under which they do not; a family that honours one
names it in ``reads``."""

_GENERATION = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "decoder_start_token_id", "prefix", "cache_implementation", "task_specific_params",
)  # fmt: skip
_WRITTEN_BY = (
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "unsloth_version", "unsloth_fixed",
    "_unsloth_temporary_saved_buffers",
)  # fmt: skip
_RUNTIME = (
    "use_cache", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_experts_implementation", "chunk_size_feed_forward", "torchscript",
    "use_bfloat16", "gradient_checkpointing", "return_dict", "output_attentions", "output_hidden_states",
    "output_scores", "return_dict_in_generate", "tf_legacy_loss",
)  # fmt: skip
_OTHER_HEADS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class")
HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(_GENERATION, "read when text is generated"),
    **dict.fromkeys(_WRITTEN_BY, "says who wrote the file"),
    **dict.fromkeys(_RUNTIME, "how a process runs the model, not what it computes"),
    **dict.fromkeys(_OTHER_HEADS, "of a classifier on the model"),
    **dict.fromkeys(_TOKENS, "of the tokenizer, which is compared by itself"),
    **dict.fromkeys(("dtype", "torch_dtype"), "the files' own is taken"),
    "attention_dropout": "training runs without dropout",
    "is_decoder": "every family is one",
    "auto_map": "code of the model's own, which is not run",
}
"""Fields of any family that change no log-probability, and why."""
HEADER = ("architectures", "model_type", "vocab_size", "tie_word_embeddings", "initializer_range")
"""Read of every family."""


def check_fields(family: Family, config: HfConfig) -> None:
    """Refuse a field of config.json that is not known to be read, or to change nothing.

    Raises:
        ConfigError: the field, its value and the nearest known one.
    """
    for name, values in NEUTRAL.items():
        if name not in family.reads:
            require(config, name, *values)
    known = {*HEADER, *family.reads, *NEUTRAL, *HARMLESS, *family.harmless}
    _refuse_unknown(config, known, f"a {family.model_type}")


def check_wrapper_fields(family: Family, config: HfConfig) -> None:
    """The same of the configuration around a model with others beside it."""
    known = {*HEADER, *family.wrapper_reads, "quantization_config", *HARMLESS, *family.harmless}
    _refuse_unknown(config, known, f"a {family.wrapper}")


def _refuse_unknown(config: HfConfig, known: set[str], what: str) -> None:
    for name, value in config.items():
        if name not in known and value is not None:
            hint = did_you_mean(name, known, otherwise="")
            raise ConfigError(
                f"{name} is {value!r}, a field that {what} is not known here to have{hint}; it may change the model. "
                "Correct it, or remove it if it means nothing"
            )


def require(config: HfConfig, name: str, *allowed: Any) -> None:
    """Refuse a field of config.json that is present with another value than the allowed ones."""
    value = config.get(name, allowed[0])
    if value not in allowed:
        raise ConfigError(
            f"{name} is {value!r}, which the model section has no field for; only {_either(allowed)} can be converted"
        )


_SIZES = frozenset(
    {
        "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups", "kv_channels",
        "max_position_embeddings", "norm_epsilon", "vocab_size",
    }
)  # fmt: skip
_NOT_COMPUTED = frozenset({"make_vocab_size_divisible_by", "init_method_std", "transformer_impl", "moe_router_dtype"})


def require_model(model: ModelConfig, family: str, *, expressed: tuple[str, ...], **values: Any) -> None:
    """Refuse a model that the family cannot express.

    Args:
        model: the model.
        family: its name, for messages.
        expressed: fields of ModelConfig, beside the sizes, that the family's config.json has.
        values: what the family fixes; every other field of ModelConfig must have its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    free = {*_SIZES, *_NOT_COMPUTED, *expressed}
    for name, value in (values | {n: d for n, d in defaults.items() if n not in free | values.keys()}).items():
        if getattr(model, name) != value:
            raise ConfigError(f"{family} has {name} {value!r}, the model {getattr(model, name)!r}")


def one_of(config: HfConfig, name: str, known: Mapping[str, str]) -> str:
    """Translate a field whose values have other names here; refuse the others."""
    require(config, name, *known)
    return known[config[name]]


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
