"""``rope_parameters`` of a config.json and the model section's fields for it.

A family with layers of two kinds has one set of parameters for each kind, ``full_attention`` and ``sliding_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, require
from megatron_groupdpo.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = (
    "rotary_base",
    "rope_scaling_type",
    "rope_scaling_factor",
    "rope_scaling_original_length",
    "rope_scaling_low_freq_factor",
    "rope_scaling_high_freq_factor",
    "rope_scaling_beta_fast",
    "rope_scaling_beta_slow",
    "rope_scaling_attention_factor",
)
"""Fields of ModelConfig for one set of parameters."""

_SCALINGS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_scaling_original_length",
        "low_freq_factor": "rope_scaling_low_freq_factor",
        "high_freq_factor": "rope_scaling_high_freq_factor",
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_scaling_original_length",
        "beta_fast": "rope_scaling_beta_fast",
        "beta_slow": "rope_scaling_beta_slow",
        "attention_factor": "rope_scaling_attention_factor",
    },
}
"""By ``rope_type``: its parameters, and ModelConfig's fields."""
_NOT_PARAMETERS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
"""Read apart; the last may stand beside types that do not read it."""


def rope_fields(rope: Mapping[str, Any] | None, *, where: str = "rope_parameters") -> dict[str, Any]:
    """Fields of ModelConfig for one set of parameters; what cannot be expressed is refused by name."""
    named = {f"{where}.{name}": value for name, value in (rope or {}).items()}
    require(named, f"{where}.rope_type", "default", *_SCALINGS)
    kind = named.get(f"{where}.rope_type", "default")
    require(named, f"{where}.partial_rotary_factor", 1.0, None)
    theta = named.get(f"{where}.rope_theta")
    if not isinstance(theta, int | float) or theta != int(theta) or theta < 1:
        raise ConfigError(f"{where}.rope_theta is {theta!r}; only whole positive numbers can be converted")
    fields: dict[str, Any] = {"rotary_base": int(theta)}
    if kind != "default":
        fields["rope_scaling_type"] = kind
    given = {name: value for name, value in (rope or {}).items() if value is not None}
    known = _SCALINGS.get(kind, {})
    for name in sorted(given.keys() - known.keys() - _NOT_PARAMETERS):
        require(named, f"{where}.{name}", True if name == "truncate" else None)
    for name, field in known.items():
        if name in given:
            fields[field] = int(given[name]) if field == "rope_scaling_original_length" else float(given[name])
    if kind == "yarn" and "attention_factor" not in given:
        factor = given["factor"]
        fields["rope_scaling_attention_factor"] = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return fields


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """One set of parameters of a model."""
    kind = model.rope_scaling_type
    rope = {"rope_theta": float(model.rotary_base), "rope_type": kind or "default"}
    return rope | {name: getattr(model, field) for name, field in _SCALINGS.get(kind or "", {}).items()}


def two_rope_fields(config: HfConfig) -> dict[str, Any]:
    """Fields for both kinds of layers; a kind that the model has no layer of does not count."""
    full, sliding = (
        rope_fields(config["rope_parameters"].get(kind), where=f"rope_parameters.{kind}") for kind in (FULL, SLIDING)
    )
    if SLIDING not in config["layer_types"] or full == sliding:
        return full
    if FULL not in config["layer_types"]:
        return sliding
    name = f"rope_parameters.{SLIDING}.rope_type"
    require({name: sliding.get("rope_scaling_type", "default")}, name, "default")
    return full | {"rotary_base_local": sliding["rotary_base"]}


def two_rope_config(model: ModelConfig) -> dict[str, Any]:
    """``rope_parameters`` with both kinds; in place of what readers older than transformers 5 look for."""
    full = rope_config(model)
    local = {"rope_theta": float(model.rotary_base_local or 0), "rope_type": "default"}
    both = {FULL: full, SLIDING: full if model.rotary_base_local is None else local}
    return {"rope_parameters": both, "rope_theta": None, "rope_scaling": None}
