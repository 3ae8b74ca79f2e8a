"""What a model family declares, and the words for saying that a configuration is not one of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_groupdpo.config import ModelConfig
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
    reads: tuple[str, ...] = ()
    """Fields of config.json that ``to_model`` honours or refuses itself, though most families have no use for them
    (see ``_NEUTRAL`` in ``hf/model.py``)."""


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
