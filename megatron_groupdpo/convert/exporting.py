"""A policy, or a distributed checkpoint, to a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert import tokenizers
from megatron_groupdpo.convert.families import Family, family_for_export, family_named
from megatron_groupdpo.convert.folders import check_target, new_folder
from megatron_groupdpo.convert.hf_files import INDEX, WEIGHTS
from megatron_groupdpo.convert.hf_model import CONFIG, GENERATION_CONFIG, model_of_config
from megatron_groupdpo.convert.importing import DTYPES
from megatron_groupdpo.convert.plan import conversion_plan
from megatron_groupdpo.convert.weights import assemble, whole_tensors
from megatron_groupdpo.data.tokenizer import Tokenizer
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.checkpoint import find_checkpoint, read_common, weights_dtype
from megatron_groupdpo.mcore.policy import Policy, load_policy, model_identity
from megatron_groupdpo.mcore.setup import Ranks

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Choices of an export."""

    family: str | None = None
    """The family to write; none: the one imported, else the first that can express the model."""
    dtype: str = "keep"
    """``fp32``, ``bf16``, ``fp16``, or ``keep``: as imported, else as in the checkpoint."""
    max_shard_size: int = 5 * 10**9
    """Bytes of tensors in one file; a larger tensor has a file of its own."""
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was made."""

    folder: Path
    family: Family
    dtype: torch.dtype
    num_files: int
    num_bytes: int
    has_tokenizer: bool


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB`` or a plain number; decimal units, as in ``transformers``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size takes a size such as 500MB or 5GB, got {text!r}")
    return size


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    options: ExportOptions,
    ranks: Ranks,
    *,
    tokenizer: str | None = None,
    with_tokenizer: bool = True,
) -> ExportReport:
    """Write the Hugging Face form of a distributed checkpoint.

    Args:
        checkpoint: a run's ``save`` folder or one of its ``iter_`` folders.
        output: the folder to make.
        options: see :class:`ExportOptions`.
        ranks: of a single process, which holds the model.
        tokenizer: a tokenizer in place of the one that the checkpoint names.
        with_tokenizer: False leaves it out.

    Raises:
        CheckpointError: no such checkpoint; its tokenizer has gone; the output cannot be made.
        ConfigError: no known family is this model.
        DataError: the given tokenizer cannot be loaded or does not fit.
    """
    folder = find_checkpoint(checkpoint)
    check_target(output, overwrite=options.overwrite, marker=CONFIG, source=checkpoint)
    common = read_common(folder)
    model = ModelConfig(**common["model"])
    kept = common["config"].get("hugging_face")
    choose_form(model, options, kept)
    own: Tokenizer | None = None
    if with_tokenizer and tokenizer is not None:
        own = tokenizers.load_checked(tokenizers.options_for(tokenizer), model)
    elif with_tokenizer:
        own = tokenizers.of_checkpoint(common["config"].get("tokenizer"), folder, model)
    precision = PrecisionConfig(bf16=weights_dtype(folder) == torch.bfloat16)
    policy = load_policy(folder, ParallelConfig(), precision, ranks)
    return export_hf(policy, output, options, tokenizer=own, kept=kept, source=checkpoint)


def export_hf(
    policy: Policy,
    output: Path,
    options: ExportOptions,
    *,
    tokenizer: Tokenizer | None,
    kept: Mapping[str, Any] | None = None,
    source: Path | None = None,
) -> ExportReport:
    """Write a policy that one process holds, with its tokenizer, as a Hugging Face folder.

    Args:
        policy: on one tensor- and pipeline-parallel rank.
        output: the folder to make.
        options: see :class:`ExportOptions`.
        tokenizer: saved beside the model, and the source of its end token; None: neither.
        kept: what an imported checkpoint says of its origin; its config.json is written again where it still
            describes the model.
        source: a folder that must not be replaced by the output.

    Raises:
        ConfigError: no known family is this model.
        CheckpointError: the output cannot be made.
    """
    family, config = choose_form(policy.model, options, kept)
    dtype = _dtype(policy, options, kept)
    with new_folder(output, overwrite=options.overwrite, marker=CONFIG, source=source) as folder:
        generation = (kept or {}).get("generation_config") or {"_from_model_config": True, **_token_ids(tokenizer)}
        config = config if _is_kept(config, kept) else {**config, **_token_ids(tokenizer)}
        _write_json(folder / CONFIG, _with_dtype(config, dtype))
        _write_json(folder / GENERATION_CONFIG, generation)
        if tokenizer is not None:
            tokenizer.save(folder)
        num_files, num_bytes = _write_weights(policy, family, folder, dtype, options.max_shard_size)
    return ExportReport(
        folder=output,
        family=family,
        dtype=dtype,
        num_files=num_files,
        num_bytes=num_bytes,
        has_tokenizer=tokenizer is not None,
    )


def choose_form(
    model: ModelConfig, options: ExportOptions, kept: Mapping[str, Any] | None
) -> tuple[Family, dict[str, Any]]:
    """Family and config.json of an export: the imported ones where they still describe the model."""
    if options.dtype not in ("keep", *DTYPES):
        raise ConfigError(f"--dtype must be one of keep, {', '.join(DTYPES)}, got {options.dtype!r}")
    if kept is not None and options.family in (None, kept["family"]):
        family = family_named(kept["family"])
        before = model_identity(model_of_config(family, kept["config"]))
        now = model_identity(model)
        if all(before[name] == now[name] for name in now if name != "make_vocab_size_divisible_by"):
            return family, dict(kept["config"])
    if options.family is not None:
        family = family_named(options.family)
        return family, _header(family) | family.to_hf(model)
    family, config = family_for_export(model)
    return family, _header(family) | config


def _header(family: Family) -> dict[str, Any]:
    return {"architectures": [family.architecture], "model_type": family.model_type}


def _is_kept(config: Mapping[str, Any], kept: Mapping[str, Any] | None) -> bool:
    return kept is not None and config == kept["config"]


def _dtype(policy: Policy, options: ExportOptions, kept: Mapping[str, Any] | None) -> torch.dtype:
    if options.dtype != "keep":
        return DTYPES[options.dtype]
    return DTYPES[kept["dtype"]] if kept is not None else policy.config.params_dtype


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    # transformers before 5 calls the field torch_dtype, and 5 reads either
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, field: str(dtype).removeprefix("torch.")}


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Written also where there are none: a family's default ids are tokens of another tokenizer."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _write_weights(
    policy: Policy, family: Family, folder: Path, dtype: torch.dtype, max_shard_size: int
) -> tuple[int, int]:
    """Tensor by tensor; at most one file's tensors are copied at a time. Returns the numbers of files and bytes."""
    plan = conversion_plan(family, policy.model)
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize for pair in plan.values() for name, shape in pair.hf.items()
    }
    files = assign_files(sizes, max_shard_size)
    waiting: dict[str, dict[str, Tensor]] = {}
    counts = {file: list(files.values()).count(file) for file in set(files.values())}
    for name, tensor in _hf_tensors(policy, family):
        file = files[name]
        held = waiting.setdefault(file, {})
        # clone: a view of the model's weight would be written with all of its storage
        held[name] = tensor.to(device="cpu", dtype=dtype).clone(memory_format=torch.contiguous_format)
        if len(held) == counts[file]:
            _save(waiting.pop(file), folder / file)
    assert not waiting
    total = sum(sizes.values())
    if len(counts) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    return len(counts), total


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from error


def _hf_tensors(policy: Policy, family: Family) -> Iterator[tuple[str, Tensor]]:
    shards = whole_tensors(policy)
    for key, pair in conversion_plan(family, policy.model).items():
        yield from pair.split(assemble(shards[key], pair.shape).detach()).items()


def assign_files(sizes: Mapping[str, int], max_shard_size: int) -> dict[str, str]:
    """File name of each tensor, in order: a new file where the next tensor would exceed the limit."""
    numbers, number, used = {}, 1, 0
    for name, size in sizes.items():
        if used and used + size > max_shard_size:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    if number == 1:
        return dict.fromkeys(sizes, WEIGHTS)
    stem = WEIGHTS.removesuffix(".safetensors")
    return {name: f"{stem}-{index:05d}-of-{number:05d}.safetensors" for name, index in numbers.items()}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
