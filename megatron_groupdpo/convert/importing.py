"""A Hugging Face folder to a distributed checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert.folders import check_target, new_folder_of_all_ranks
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.folder import CONFIG, GENERATION_CONFIG
from megatron_groupdpo.convert.hf.model import HfModel, open_hf_model
from megatron_groupdpo.convert.hf.side_files import check_generation_config
from megatron_groupdpo.convert.hf.tokenizers import ModelTokenizer
from megatron_groupdpo.convert.weights.loading import fill_on_all_ranks, with_vocabulary_padding
from megatron_groupdpo.data.text.identity import describe
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import CheckpointError
from megatron_groupdpo.mcore.checkpoint.folders import TRACKER, Progress
from megatron_groupdpo.mcore.checkpoint.training import save_checkpoint
from megatron_groupdpo.mcore.policy import build_policy, model_identity
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.processes import errors_reach_all_ranks, on_first_rank

MODEL_YAML = "model.yaml"
"""The checkpoint's model section, to be put into a run's configuration."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Choices of an import."""

    dtype: str = "keep"
    """``fp32`` or ``bf16``; ``keep``: as in the files, with fp16 held in fp32, which is exact."""
    make_vocab_size_divisible_by: int | None = None
    """Padding of the vocabulary in the checkpoint's model section; none: ModelConfig's default."""
    tokenizer: str | None = None
    """A tokenizer in place of the folder's own."""
    with_tokenizer: bool = True
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What was made."""

    source: HfModel
    checkpoint: Path
    model: ModelConfig
    dtype: torch.dtype
    """Of the checkpoint's weights."""
    has_tokenizer: bool


def import_hf(
    folder: Path, output: Path, options: ImportOptions, ranks: Ranks, *, parallel: ParallelConfig | None = None
) -> ImportReport:
    """Write ``output/iter_0000000``, its tracker, ``model.yaml`` and the tokenizer.

    Every rank makes the same call, holds its part of the model on the layout, and reads what that part needs; the
    checkpoint loads on any layout.

    Raises:
        ConfigError: a field of config.json that cannot be converted.
        CheckpointError: something is wrong with the folder, or the output cannot be made.
        DataError: the tokenizer does not fit.
    """
    with errors_reach_all_ranks():
        source, model, tokenizer = prepare_import(folder, output, options)
    bf16 = options.dtype == "bf16" or (options.dtype == "keep" and source.dtype == torch.bfloat16)
    policy = build_policy(
        model, parallel or ParallelConfig(), PrecisionConfig(bf16=bf16), ranks, seed=None, training=False
    )
    fill_on_all_ranks(policy, source)
    section = {"model": dataclasses.asdict(model)}

    def write_beside(partial: Path) -> dict[str, Any] | None:
        (partial / MODEL_YAML).write_text(yaml.safe_dump(section, sort_keys=False))
        return _keep_tokenizer(tokenizer, partial, output)

    with new_folder_of_all_ranks(output, overwrite=options.overwrite, marker=TRACKER, source=folder) as partial:
        described = on_first_rank(lambda: write_beside(partial))
        save_checkpoint(
            partial,
            policy.chunks,
            progress=Progress(),
            model=model_identity(model),
            config={
                "yaml": yaml.safe_dump(section, sort_keys=False),
                "tokenizer": described,
                "hugging_face": kept_of(source, options.dtype),
            },
        )
    return ImportReport(
        source=source,
        checkpoint=output,
        model=model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        has_tokenizer=tokenizer is not None,
    )


def prepare_import(
    folder: Path, output: Path, options: ImportOptions
) -> tuple[HfModel, ModelConfig, ModelTokenizer | None]:
    """Everything that can be refused, before a model is built."""
    source = open_hf_model(folder)
    kept_of(source, options.dtype)
    check_target(output, overwrite=options.overwrite, marker=TRACKER, source=folder)
    model = with_vocabulary_padding(source.model, options.make_vocab_size_divisible_by)
    if not options.with_tokenizer:
        return source, model, None
    if options.tokenizer is not None:
        given = tokenizers.load_checked(tokenizers.options_for(options.tokenizer), model)
        tokenizers.check_given(given, tokenizers.of_folder(folder), str(folder))
        return source, model, given
    if not tokenizers.has_tokenizer(folder):
        return source, model, None
    return source, model, tokenizers.load_checked(tokenizers.options_for(str(folder.resolve())), model)


def _keep_tokenizer(tokenizer: ModelTokenizer | None, partial: Path, output: Path) -> dict[str, Any] | None:
    """Write the tokenizer into the checkpoint; what the checkpoint will say of it."""
    if tokenizer is None:
        return None
    kept = partial / tokenizers.FOLDER
    tokenizer.write(kept)
    # Described as it will be read: a SentencePiece model saved in this form has another digest.
    saved = tokenizers.load_tokenizer(TokenizerOptions(kind="HuggingFaceTokenizer", model=str(kept.resolve())))
    final = output.resolve() / tokenizers.FOLDER
    return describe(saved, TokenizerOptions(kind="HuggingFaceTokenizer", model=str(final)))


def kept_of(source: HfModel, dtype: str = "keep") -> dict[str, Any]:
    """What a checkpoint says of its Hugging Face origin, for a later export to restore word for word.

    Raises:
        CheckpointError: generation_config.json is not JSON.
        ConfigError: it has a mistyped field.
    """
    names = {value: name for name, value in DTYPES.items()}
    others: dict[str, str] = {}
    if dtype == "keep":
        dtype = names[source.dtype]
        others = {name: names[own] for name, own in source.dtypes.items() if names[own] != dtype}
    kept: dict[str, Any] = {"family": source.family.name, "dtype": dtype, "config": source.config}
    if others:
        kept["tensor_dtypes"] = others
    kept["texts"] = {CONFIG: (source.folder / CONFIG).read_text(encoding="utf-8")}
    file = source.folder / GENERATION_CONFIG
    if file.exists():
        try:
            kept["texts"][GENERATION_CONFIG] = file.read_text(encoding="utf-8")
            kept["generation_config"] = json.loads(kept["texts"][GENERATION_CONFIG])
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON ({error}); get it again, or remove it") from None
        check_generation_config(kept["generation_config"], file)
    return kept
