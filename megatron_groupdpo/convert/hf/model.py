"""A Hugging Face folder, understood: which family, which model, and where each of its tensors is.

Everything that can be wrong with a folder is found here, from its configuration and the headers of its files, before a
model is built or a file written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families import Family, HfConfig, family_of_config
from megatron_groupdpo.convert.families.base import check_fields, check_wrapper_fields
from megatron_groupdpo.convert.hf.files import HfWeights, refuse_gguf
from megatron_groupdpo.convert.hf.folder import CONFIG
from megatron_groupdpo.convert.tensors.plan import Key, Pair, conversion_plan
from megatron_groupdpo.errors import CheckpointError, ConfigError

_SHOWN = 3
"""Tensors named in one message."""
_ROWS_AT_ONCE = 4096
"""Of two tensors that are compared."""

_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
"""Fields that a wrapper's configuration may hold for the model inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfModel:
    """A model in its Hugging Face form, not yet loaded."""

    folder: Path
    family: Family
    config: dict[str, Any]
    """config.json, word for word; of a wrapper, the part of the model inside."""
    model: ModelConfig
    plan: dict[Key, Pair]
    weights: HfWeights
    names: dict[str, str]
    """The plan's tensor names to the file's, which may lack the family's prefix."""
    ignored: tuple[str, ...]
    """Tensors in the files that are not read."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.weights.dtype(set(self.names.values()))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each tensor of the plan; equal in most models."""
        found = self.weights.dtypes(set(self.names.values()))
        return {name: found[own] for name, own in self.names.items()}

    def read(self, key: Key) -> Tensor:
        """The whole Megatron tensor, in the files' dtype, without rows that pad the vocabulary."""
        pair = self.plan[key]
        return pair.merge([self.weights.read(self.names[name]) for name in pair.hf])

    def read_into(self, out: Tensor, key: Key, window: tuple[slice, ...]) -> None:
        """Copy a window of a tensor whose pair :attr:`~Pair.moves_rows`; beside the window little is read."""
        pair = self.plan[key]
        rows, *columns = (range(size)[part] for size, part in zip(pair.shape, window, strict=True))
        beside = tuple(slice(part.start, part.stop) for part in columns)
        start = 0
        for name, first, last in pair.sources(rows):
            part = self.weights.read(self.names[name], (slice(first, last), *beside))
            out[start : start + len(part)].copy_(part)
            start += len(part)
        assert start == len(rows)


def open_hf_model(folder: Path) -> HfModel:
    """Read a folder's configuration and headers, and check them against each other.

    Raises:
        ConfigError: an architecture or field that cannot be converted.
        CheckpointError: not a model folder, a LoRA adapter, corrupt files; a tensor missing, unknown or misshapen.
    """
    family, config, model = config_of_folder(folder)
    weights = HfWeights(folder, joined=family.joined)
    plan = conversion_plan(family, model)
    expected = {name: shape for pair in plan.values() for name, shape in pair.hf.items()}
    names = _names_in_file(expected, weights, family)
    ignored = _check_names(folder, set(expected), names, weights, family, model)
    for name, shape in expected.items():
        found = weights.shapes[names[name]]
        if found != shape:
            raise CheckpointError(
                f"{folder}: tensor {weights.label(names[name])} has shape {list(found)}, {CONFIG} asks for "
                f"{list(shape)}; the files and the configuration are not of one model"
            )
    weights.dtype(set(names.values()))
    return HfModel(
        folder=folder,
        family=family,
        config=config,
        model=model,
        plan=plan,
        weights=weights,
        names=names,
        ignored=ignored,
    )


def config_of_folder(folder: Path) -> tuple[Family, dict[str, Any], ModelConfig]:
    """Family, configuration (of a wrapper, the inner model's) and model section; the weights are not looked at.

    Raises:
        ConfigError: an architecture or field that cannot be converted.
        CheckpointError: not a model folder.
    """
    config = _read_config(folder)
    try:
        family = family_of_config(config)
        if family.wrapper in (config.get("architectures") or ()):
            check_wrapper_fields(family, config)
        config = text_part(family, config)
        return family, config, model_of_config(family, config)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None


def model_of_config(family: Family, config: HfConfig) -> ModelConfig:
    """The model section of a config.json of the family; ConfigError names what cannot be converted."""
    from transformers import CONFIG_MAPPING

    check_fields(family, config)
    if "layer_types" not in family.reads and set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(f"layer_types is {config['layer_types']!r}; only 'full_attention' can be converted")
    try:
        complete = (
            CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(dict(config))).to_dict()
        )  # which writes into it
    except Exception as error:  # transformers validates with errors of several libraries
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers refuses it as a {family.model_type} configuration ({reason})") from None
    model = family.to_model(complete)
    _check_sizes(model)
    return model


def _check_sizes(model: ModelConfig) -> None:
    """What would be found only in shapes, or by Megatron."""
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")
    for name in (*sizes, "moe_ffn_hidden_size", "vocab_size", "max_position_embeddings"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise ConfigError(f"gives the model {name} {value}, which must be at least 1; get the file again")
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if heads % groups:
        raise ConfigError(f"{heads} attention heads must be a multiple of {groups} key-value heads; get the file again")
    experts, chosen = model.num_moe_experts, model.moe_router_topk
    if experts is not None and not 1 <= chosen <= experts:
        raise ConfigError(f"num_experts_per_tok is {chosen}, of {experts} experts; get the file again")


def text_part(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the family's own model inside a wrapper; any other as it is."""
    if family.wrapper is None or family.wrapper not in (config.get("architectures") or ()):
        return config
    if not isinstance(config.get("text_config"), dict):
        raise ConfigError(f"text_config is missing, which a {family.wrapper} has")
    outer = {name: config[name] for name in _OUTER if name in config}
    header = {"architectures": [family.architecture], "model_type": family.model_type}
    return outer | config["text_config"] | header


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        refuse_gguf(folder)
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give the folder of a Hugging Face model")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), not a model; merge it into its base model first, with "
            "peft's merge_and_unload(), and convert the result"
        )
    if not (folder / CONFIG).is_file():
        refuse_gguf(folder)
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face model")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG} is not JSON ({error}); get it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / CONFIG} must hold an object, found a {type(config).__name__}; get it again")
    return config


def _names_in_file(expected: Iterable[str], weights: HfWeights, family: Family) -> dict[str, str]:
    found = {}
    for name in expected:
        others = [name.replace(old, new, 1) for old, new in family.renamed if old in name]
        for candidate in (name, name.removeprefix(family.prefix), *others):
            if candidate in weights.shapes:
                found[name] = candidate
                break
    return found


def _check_names(
    folder: Path, expected: set[str], names: dict[str, str], weights: HfWeights, family: Family, model: ModelConfig
) -> tuple[str, ...]:
    """Refuse missing and unknown tensors; the names of those that are passed over."""
    missing = sorted(expected - names.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: missing {_listed(missing)}, which a {family.architecture} with this {CONFIG} has; "
            "get the model again, or correct the configuration"
        )
    tied = {} if model.untie_embeddings_and_output_weights else family.tied_copies
    ignored, unknown = [], []
    for name in sorted(weights.shapes.keys() - set(names.values())):
        if name in tied:
            _check_copy(folder, name, names[tied[name]], weights)
            ignored.append(name)
        elif any(re.fullmatch(pattern, full) for pattern in family.ignorable for full in (name, family.prefix + name)):
            ignored.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{folder}: unexpected {_listed(unknown)}, which no {family.architecture} with this {CONFIG} has; "
            "converting without it would change the model"
        )
    return tuple(ignored)


def _check_copy(folder: Path, copy: str, original: str, weights: HfWeights) -> None:
    shapes = weights.shapes
    rows = shapes[original][0]
    blocks = [(slice(row, min(row + _ROWS_AT_ONCE, rows)),) for row in range(0, rows, _ROWS_AT_ONCE)]
    if shapes[copy] != shapes[original] or not all(
        torch.equal(weights.read(copy, block), weights.read(original, block)) for block in blocks
    ):
        raise CheckpointError(
            f"{folder}: {CONFIG} ties the embeddings, but the tensors {copy!r} and {original!r} differ; "
            "set tie_word_embeddings to false there if the output layer has weights of its own"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    rest = len(names) - _SHOWN
    return f"tensor{'s' * (len(names) > 1)} {shown}" + (f" and {rest} more" if rest > 0 else "")
