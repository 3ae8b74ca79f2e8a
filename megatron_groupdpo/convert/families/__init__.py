"""The registry of model families. A new one is a file in this folder and its name in ``FAMILIES``."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.config.options import did_you_mean
from megatron_groupdpo.convert.families.base import Family, HfConfig, Rule
from megatron_groupdpo.convert.families.gemma3 import GEMMA3
from megatron_groupdpo.convert.families.gpt2 import GPT2
from megatron_groupdpo.convert.families.llama import LLAMA
from megatron_groupdpo.convert.families.mistral import MISTRAL
from megatron_groupdpo.convert.families.mixtral import MIXTRAL
from megatron_groupdpo.convert.families.olmo2 import OLMO2
from megatron_groupdpo.convert.families.olmo3 import OLMO3
from megatron_groupdpo.convert.families.olmoe import OLMOE
from megatron_groupdpo.convert.families.qwen2 import QWEN2
from megatron_groupdpo.convert.families.qwen3 import QWEN3
from megatron_groupdpo.convert.families.qwen3_moe import QWEN3_MOE
from megatron_groupdpo.errors import ConfigError

__all__ = ["FAMILIES", "Family", "HfConfig", "Rule", "family_for_export", "family_named", "family_of_config"]

FAMILIES: tuple[Family, ...] = (
    LLAMA, QWEN2, QWEN3, MISTRAL, OLMO2, OLMO3, GEMMA3, GPT2, MIXTRAL, QWEN3_MOE, OLMOE,
)  # fmt: skip
"""On export the first that can express the model is taken."""


def family_of_config(config: HfConfig) -> Family:
    """The family of a config.json: by ``architectures[0]``, or ``model_type`` where it names no architecture.

    Raises:
        ConfigError: unknown, or neither field is there.
    """
    by_architecture = {family.architecture: family for family in FAMILIES}
    by_architecture |= {family.wrapper: family for family in FAMILIES if family.wrapper}
    by_type = {family.model_type: family for family in FAMILIES}
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(architectures, list) and architectures:
        return _look_up(str(architectures[0]), by_architecture, "architectures[0]")
    if model_type is not None:
        return _look_up(str(model_type), by_type, "model_type")
    raise ConfigError(f"names no architecture (architectures, model_type); known are {', '.join(by_architecture)}")


def family_named(name: str) -> Family:
    """The family with this name; ConfigError for an unknown one."""
    return _look_up(name, {family.name: family for family in FAMILIES}, "family")


def family_for_export(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can express the model, and its config.json.

    Raises:
        ConfigError: none can; each one's reason.
    """
    reasons = []
    for family in FAMILIES:
        try:
            return family, family.to_hf(model)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(f"no family of transformers models known here is this model: {'; '.join(reasons)}")


def _look_up(word: str, known: dict[str, Family], what: str) -> Family:
    if word in known:
        return known[word]
    hint = did_you_mean(word, known, otherwise="")
    raise ConfigError(f"{what} is {word!r}, which is not known here{hint} (known: {', '.join(known)})")
