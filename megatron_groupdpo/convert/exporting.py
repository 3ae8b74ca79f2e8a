"""A policy, or a distributed checkpoint, to a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families import Family, family_for_export, family_named
from megatron_groupdpo.convert.folders import check_target, new_folder
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.files import byte_bar
from megatron_groupdpo.convert.hf.folder import CONFIG, GENERATION_CONFIG
from megatron_groupdpo.convert.hf.model import model_of_config
from megatron_groupdpo.convert.hf.shards import write_json, write_shards
from megatron_groupdpo.convert.hf.tokenizers import ModelTokenizer
from megatron_groupdpo.convert.importing import DTYPES
from megatron_groupdpo.convert.tensors.plan import Key, Pair, conversion_plan
from megatron_groupdpo.convert.weights.loading import NOT_THE_WEIGHTS
from megatron_groupdpo.convert.weights.whole_tensors import checkpoint_tensors, gathered_tensors
from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint, read_common, weights_dtype
from megatron_groupdpo.mcore.policy import Policy, model_identity
from megatron_groupdpo.processes import on_first_rank

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
class Dtypes:
    """Of an export's tensors."""

    most: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict)
    """By tensor, where the import found several."""

    def of(self, name: str) -> torch.dtype:
        """A tensor's."""
        return self.others.get(name, self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was made."""

    folder: Path
    architecture: str
    dtype: torch.dtype
    num_files: int
    num_bytes: int
    has_tokenizer: bool
    notes: tuple[str, ...] = ()
    """What people should know of it."""


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
    *,
    tokenizer: str | None = None,
    with_tokenizer: bool = True,
) -> ExportReport:
    """Write the Hugging Face form of a distributed checkpoint, in one process, without building the model.

    Host memory: one file of the output, one tensor, and one saved shard of it.

    Args:
        checkpoint: a run's ``save`` folder or one of its ``iter_`` folders.
        output: the folder to make.
        options: see :class:`ExportOptions`.
        tokenizer: a tokenizer in place of the one that the checkpoint names.
        with_tokenizer: False leaves it out.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one; its tokenizer has gone; the output cannot be made.
        ConfigError: no known family is this model.
        DataError: the given tokenizer cannot be loaded or does not fit.
    """
    folder = find_checkpoint(checkpoint)
    check_target(output, overwrite=options.overwrite, marker=CONFIG, source=checkpoint)
    common = read_common(folder)
    model = ModelConfig(**common["model"])
    kept = common["config"].get("hugging_face")
    form = choose_form(model, options, kept)
    own: ModelTokenizer | None = None
    if with_tokenizer and tokenizer is not None:
        own = tokenizers.load_checked(tokenizers.options_for(tokenizer), model)
        tokenizers.check_given(own, common["config"].get("tokenizer"), str(folder))
    elif with_tokenizer:
        own = tokenizers.of_checkpoint(common["config"].get("tokenizer"), folder, model)
    plan = conversion_plan(form.family, model)
    dtypes = _dtypes(options, kept, weights_dtype(folder))
    whole = checkpoint_tensors(folder, plan)
    ends = (common["config"].get("tokenizer") or {}).get("response_ends", ())
    with new_folder(output, overwrite=options.overwrite, marker=CONFIG, source=checkpoint) as partial:
        return _write_folder(partial, output, form, plan, whole, dtypes, options.max_shard_size, own, ends)


def export_hf(
    policy: Policy,
    output: Path,
    options: ExportOptions,
    *,
    tokenizer: ModelTokenizer | None,
    kept: Mapping[str, Any] | None = None,
    source: Path | None = None,
    response_ends: Sequence[int] = (),
) -> ExportReport:
    """Write a policy, on whatever layout, with its tokenizer, as a Hugging Face folder.

    A collective call: the ranks send their parts to rank 0, which writes, one tensor at a time.

    Args:
        policy: the model.
        output: the folder to make.
        options: see :class:`ExportOptions`.
        tokenizer: saved beside the model, and the source of its end token; None: neither.
        kept: what an imported checkpoint says of its origin; its config.json is written again where it still
            describes the model.
        source: a folder that must not be replaced by the output.
        response_ends: tokens that the trained responses end with; generation must stop at them.

    Raises:
        ConfigError: no known family is this model.
        CheckpointError: the output cannot be made; on every rank.
    """
    form = choose_form(policy.model, options, kept)
    plan = conversion_plan(form.family, policy.model)
    dtypes = _dtypes(options, kept, policy.config.params_dtype)
    whole = gathered_tensors(policy, plan)

    def write() -> ExportReport:
        rules: dict[str, Any] = {"overwrite": options.overwrite, "marker": CONFIG, "source": source}
        try:
            with new_folder(output, **rules) as partial:
                return _write_folder(
                    partial, output, form, plan, whole, dtypes, options.max_shard_size, tokenizer, response_ends
                )
        finally:
            exhaust(whole)  # after an error too: the other ranks send all they have

    if dist.get_rank() != 0:
        exhaust(whole)
    return on_first_rank(write)


def exhaust(items: Iterable[Any]) -> None:
    """Take every item."""
    deque(items, maxlen=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What an export writes beside the weights."""

    family: Family
    config: dict[str, Any]
    """config.json, without dtype and (unless kept) token ids."""
    kept: Mapping[str, Any] | None
    """What the import kept, where its configuration still describes the model."""
    generation_config: Mapping[str, Any] | None
    """As imported."""
    texts: Mapping[str, str]
    """The imported files word for word."""


def _write_folder(
    folder: Path,
    output: Path,
    form: Form,
    plan: Mapping[Key, Pair],
    whole: Iterable[tuple[Key, Tensor | None]],
    dtypes: Dtypes,
    max_shard_size: int,
    tokenizer: ModelTokenizer | None,
    response_ends: Sequence[int],
) -> ExportReport:
    """Everything of an export, into ``folder``, which will be ``output``."""
    ids = _token_ids(None if tokenizer is None else tokenizer.tokenizer)
    config = form.config if form.kept is not None else {**form.config, **ids}
    write_json(folder / CONFIG, _with_dtype(config, dtypes, form.kept), text=form.texts.get(CONFIG))
    generation = form.generation_config
    if generation is None and form.kept is None:
        generation = {"_from_model_config": True, **ids}
    generation, notes = _that_stops(generation, config, response_ends)
    if generation is not None:
        text = form.texts.get(GENERATION_CONFIG)
        write_json(folder / GENERATION_CONFIG, generation, text=text)
    if tokenizer is not None:
        tokenizer.write(folder)
        if wrong := tokenizers.how_it_is_read(folder, tokenizer):
            way_out = "read it with PreTrainedTokenizerFast.from_pretrained"
            notes = (*notes, f"warning: AutoTokenizer of this transformers misreads the tokenizer ({wrong}); {way_out}")
    shapes = {name: shape for pair in plan.values() for name, shape in pair.hf.items()}
    total = sum(torch.Size(shape).numel() * dtypes.of(name).itemsize for name, shape in shapes.items())

    def hf_tensors(bar: Any) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in whole:
            assert tensor is not None
            parts = plan[key].split(tensor)
            del tensor
            while parts:  # each is let go when the next is asked for
                name = next(iter(parts))
                yield name, parts[name]
                bar.update(parts.pop(name).numel() * dtypes.of(name).itemsize)

    with byte_bar(f"write {output}", total) as bar:
        num_files, num_bytes = write_shards(
            folder, shapes, hf_tensors(bar), dtype_of=dtypes.of, max_shard_size=max_shard_size
        )
    return ExportReport(
        folder=output,
        architecture=form.family.architecture,
        dtype=dtypes.most,
        num_files=num_files,
        num_bytes=num_bytes,
        has_tokenizer=tokenizer is not None,
        notes=notes,
    )


def _that_stops(
    generation: Mapping[str, Any] | None, config: Mapping[str, Any], response_ends: Sequence[int]
) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """generation_config.json with the tokens among its stop ids that the trained responses end with; what was added."""
    read = config if generation is None else generation
    stops = _as_list(read.get("eos_token_id"))
    missing = [token for token in response_ends if token not in stops]
    if not missing:
        return generation, ()
    if generation is None:  # transformers would take these from config.json, which stays as it is
        names = ("bos_token_id", "pad_token_id")
        generation = {name: config[name] for name in names if config.get(name) is not None}
    elif not stops:  # without them here, transformers' generate has none
        stops = _as_list(config.get("eos_token_id"))
    together = list(dict.fromkeys([*stops, *missing]))
    note = (
        f"{GENERATION_CONFIG}: eos_token_id {stops or 'none'} and the trained responses end with {missing}; all are "
        "stop ids now"
    )
    new = together if len(together) > 1 else together[0]
    # transformers makes the file anew from config.json where it says that it came from there
    own = {"_from_model_config": False} if "_from_model_config" in generation else {}
    return {**generation, "eos_token_id": new, **own}, (note,)


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def choose_form(model: ModelConfig, options: ExportOptions, kept: Mapping[str, Any] | None) -> Form:
    """Family and config.json of an export: the imported ones where they still describe the model.

    Raises:
        ConfigError: no known family is this model.
    """
    if options.dtype not in ("keep", *DTYPES):
        raise ConfigError(f"--dtype must be one of keep, {', '.join(DTYPES)}, got {options.dtype!r}")
    kept_files: Mapping[str, Any] = kept or {}
    texts = kept_files.get("texts", {})
    generation = kept_files.get("generation_config")
    if kept is not None and options.family in (None, kept["family"]):
        family = family_named(kept["family"])
        before = model_identity(model_of_config(family, kept["config"]))
        now = model_identity(model)
        if all(before[name] == now[name] for name in now if name not in NOT_THE_WEIGHTS):
            config = _as_written(family, kept, texts)
            return Form(family=family, config=config, kept=kept, generation_config=generation, texts=texts)
    if options.family is not None:
        family = family_named(options.family)
        config = family.to_hf(model)
    else:
        family, config = family_for_export(model)
    header = {"architectures": [family.architecture], "model_type": family.model_type}
    return Form(family=family, config=header | config, kept=None, generation_config=generation, texts=texts)


def _as_written(family: Family, kept: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """config.json as the source had it; of a wrapper, the part that was kept, which has no file of its own."""
    written = json.loads(texts[CONFIG]) if CONFIG in texts else {}
    is_inner = family.wrapper is not None and family.wrapper in (written.get("architectures") or ())
    return dict(kept["config"]) if is_inner or not written else written


def _dtypes(options: ExportOptions, kept: Mapping[str, Any] | None, own: torch.dtype) -> Dtypes:
    if options.dtype != "keep":
        return Dtypes(most=DTYPES[options.dtype])
    if kept is None:
        return Dtypes(most=own)
    others = {name: DTYPES[dtype] for name, dtype in kept.get("tensor_dtypes", {}).items()}
    return Dtypes(most=DTYPES[kept["dtype"]], others=others)


def _with_dtype(config: dict[str, Any], dtypes: Dtypes, kept: Mapping[str, Any] | None) -> dict[str, Any]:
    if dtypes.others:
        return config  # what it says of several dtypes, it says as before
    dtype = dtypes.most
    # transformers before 5 calls the field torch_dtype, and 5 reads either
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    if field not in config and kept is not None and DTYPES[kept["dtype"]] == dtype:
        return config  # transformers then takes the files'
    return {**config, field: str(dtype).removeprefix("torch.")}


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Written also where there are none: a family's default ids are tokens of another tokenizer."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
