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
from megatron_groupdpo.convert import tokenizers
from megatron_groupdpo.convert.folders import check_target, new_folder
from megatron_groupdpo.convert.hf_model import GENERATION_CONFIG, HfModel, open_hf_model
from megatron_groupdpo.convert.weights import fill, with_vocabulary_padding
from megatron_groupdpo.data.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import CheckpointError
from megatron_groupdpo.mcore.checkpoint import TRACKER, Progress, save_checkpoint
from megatron_groupdpo.mcore.policy import build_policy, model_identity
from megatron_groupdpo.mcore.setup import Ranks

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


def import_hf(folder: Path, output: Path, options: ImportOptions, ranks: Ranks) -> ImportReport:
    """Write ``output/iter_0000000``, its tracker, ``model.yaml`` and the tokenizer; one process holds the model.

    Raises:
        ConfigError: a field of config.json that cannot be converted.
        CheckpointError: something is wrong with the folder, or the output cannot be made.
        DataError: the tokenizer does not fit.
    """
    source, model, tokenizer = prepare_import(folder, output, options)
    bf16 = options.dtype == "bf16" or (options.dtype == "keep" and source.dtype == torch.bfloat16)
    policy = build_policy(model, ParallelConfig(), PrecisionConfig(bf16=bf16), ranks, seed=0, training=False)
    fill(policy, source)
    with new_folder(output, overwrite=options.overwrite, marker=TRACKER, source=folder) as partial:
        section = {"model": dataclasses.asdict(model)}
        described = _keep_tokenizer(tokenizer, partial, output)
        (partial / MODEL_YAML).write_text(yaml.safe_dump(section, sort_keys=False))
        save_checkpoint(
            partial,
            policy.chunks,
            progress=Progress(),
            model=model_identity(model),
            config={
                "yaml": yaml.safe_dump(section, sort_keys=False),
                "tokenizer": described,
                "hugging_face": _kept(source, options),
            },
        )
    return ImportReport(
        source=source,
        checkpoint=output,
        model=model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        has_tokenizer=tokenizer is not None,
    )


def prepare_import(folder: Path, output: Path, options: ImportOptions) -> tuple[HfModel, ModelConfig, Tokenizer | None]:
    """Everything that can be refused, before a model is built."""
    source = open_hf_model(folder)
    check_target(output, overwrite=options.overwrite, marker=TRACKER, source=folder)
    model = with_vocabulary_padding(source.model, options.make_vocab_size_divisible_by)
    if not options.with_tokenizer:
        return source, model, None
    if options.tokenizer is not None:
        return source, model, tokenizers.load_checked(tokenizers.options_for(options.tokenizer), model)
    if not tokenizers.has_tokenizer(folder):
        return source, model, None
    return source, model, tokenizers.load_checked(tokenizers.options_for(str(folder.resolve())), model)


def _keep_tokenizer(tokenizer: Tokenizer | None, partial: Path, output: Path) -> dict[str, Any] | None:
    """Save the tokenizer in the Hugging Face form beside the checkpoint; how the checkpoint names it."""
    if tokenizer is None:
        return None
    kept = partial / tokenizers.FOLDER
    tokenizer.save(kept)
    # Described as it will be read: a SentencePiece model saved in this form has another digest.
    saved = tokenizers.load_tokenizer(TokenizerOptions(kind="HuggingFaceTokenizer", model=str(kept.resolve())))
    final = output.resolve() / tokenizers.FOLDER
    return tokenizers.describe(saved, TokenizerOptions(kind="HuggingFaceTokenizer", model=str(final)))


def _kept(source: HfModel, options: ImportOptions) -> dict[str, Any]:
    """What a later export restores word for word."""
    dtype = options.dtype
    if dtype == "keep":
        dtype = next(name for name, value in DTYPES.items() if value == source.dtype)
    kept: dict[str, Any] = {"family": source.family.name, "dtype": dtype, "config": source.config}
    file = source.folder / GENERATION_CONFIG
    if file.exists():
        try:
            kept["generation_config"] = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON ({error}); get it again, or remove it") from None
    return kept
