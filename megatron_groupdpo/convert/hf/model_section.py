"""The model section of a run that starts from a Hugging Face model: what is left out comes from its config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_groupdpo.config import TrainConfig
from megatron_groupdpo.config.load import Given, refuse_missing
from megatron_groupdpo.convert.hf.folder import is_hf_folder
from megatron_groupdpo.convert.hf.hub import is_hub_name, model_folder
from megatron_groupdpo.errors import ConfigError

_OWN = frozenset({"make_vocab_size_divisible_by", "transformer_impl", "init_method_std", "moe_router_dtype"})
"""Fields that are the run's own choice, whatever the model."""
_FILLED_IN = ("ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size")


def complete_model_section(given: Given) -> Given:
    """What a command line and its file give, with the model section of the Hugging Face model they start from.

    Without such a model nothing is changed.

    Args:
        given: values by (section, field).

    Raises:
        ConfigError: a field that is given contradicts the model's; each is named with both values. Or a required
            field of another section is not given.
        CheckpointError: the model cannot be had.
    """
    named = _hf_model_of(given)
    if named is None:
        return given
    refuse_missing(TrainConfig, given, but="model")
    # What follows imports transformers, which takes seconds, and may fetch the model.
    from megatron_groupdpo.convert.hf.model import config_of_folder

    folder = model_folder(named)
    theirs = dataclasses.asdict(config_of_folder(folder)[2])
    own = {name: value for (section, name), value in given.items() if section == "model"}
    differ = [
        f"{name}: {theirs[name]!r} there, {value!r} in the model section"
        for name, value in own.items()
        if name not in _OWN and _plain(value) != _plain(theirs[name]) and not (value is None and name in _FILLED_IN)
    ]
    if differ:
        raise ConfigError(
            f"{folder} is another model ({'; '.join(differ)}); leave these out of the model section: they then are "
            "the model's"
        )
    section = theirs | {name: value for name, value in own.items() if value is not None}
    chosen = {name: value for name, value in section.items() if name not in _OWN or name in own}
    return given | {("model", name): value for name, value in chosen.items()}


def _hf_model_of(given: Given) -> str | None:
    """The Hugging Face model that ``load``, else ``pretrained_checkpoint``, names."""
    load = given.get(("checkpoint", "load"))
    if load is not None and (is_hub_name(load, bare=False) or is_hf_folder(model_folder(load, bare=False))):
        return load
    start = given.get(("checkpoint", "pretrained_checkpoint"))
    if start is not None and (is_hub_name(start) or is_hf_folder(model_folder(start))):
        return start
    return None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
