"""Weights that a run or a tool starts from: a distributed checkpoint, or a Hugging Face model, read on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.folder import is_hf_folder
from megatron_groupdpo.convert.hf.hub import is_hub_name, model_folder
from megatron_groupdpo.convert.hf.model import HfModel, open_hf_model
from megatron_groupdpo.convert.importing import kept_of
from megatron_groupdpo.convert.weights.loading import check_same_model, fill_on_all_ranks
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions, load_tokenizer
from megatron_groupdpo.errors import CheckpointError
from megatron_groupdpo.mcore.checkpoint.folders import check_same_model as check_same_checkpoint
from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint, read_common
from megatron_groupdpo.mcore.checkpoint.training import load_weights
from megatron_groupdpo.mcore.policy import Policy, build_policy, load_policy, model_identity
from megatron_groupdpo.processes import errors_reach_all_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWeights:
    """Where weights are, not read yet."""

    folder: Path
    """An ``iter_`` folder, or the folder of a Hugging Face model."""
    hf: HfModel | None = None
    """The latter, opened."""

    def __str__(self) -> str:
        return f"{self.folder}"

    def check(self, model: ModelConfig) -> None:
        """Refuse weights of another model, naming every field that differs."""
        if self.hf is not None:
            check_same_model(self.hf, model)
        else:
            check_same_checkpoint(self.folder, read_common(self.folder), model_identity(model))

    def load_into(self, policy: Policy) -> None:
        """Fill a policy on any layout; a collective call. Each rank reads its own part."""
        self.check(policy.model)
        if self.hf is not None:
            fill_on_all_ranks(policy, self.hf)
        else:
            load_weights(self.folder, policy.chunks, model=policy.identity)

    def origin(self) -> dict[str, Any] | None:
        """What is kept of the Hugging Face model the weights come from, for an export; None: there is none."""
        return read_common(self.folder)["config"].get("hugging_face") if self.hf is None else kept_of(self.hf)

    def check_tokenizer(self, recorded: dict[str, Any]) -> None:
        """Refuse a Hugging Face model whose tokenizer is not the one that the data were made with.

        Tokenizers of two kinds cannot be compared; those are left alone.
        """
        if self.hf is None or recorded["kind"] != "HuggingFaceTokenizer" or not tokenizers.has_tokenizer(self.folder):
            return
        own = load_tokenizer(
            TokenizerOptions(
                kind=recorded["kind"], model=str(self.folder.resolve()), chat_template=recorded["chat_template"]
            )
        )
        if own.digest != recorded["digest"]:
            raise CheckpointError(
                f"{self.folder} has a tokenizer of digest {own.digest[:16]}, the data were made with "
                f"{recorded['model']} ({recorded['digest'][:16]}); preprocess with the model's tokenizer"
            )


def find_weights(path: str, *, bare: bool = True) -> StartWeights:
    """What is at a path, or on the hub.

    Args:
        path: a run's ``save`` folder, an ``iter_`` folder, a Hugging Face folder, or a name on the hub.
        bare: see :func:`is_hub_name`.

    Raises:
        CheckpointError: neither is there, or it is broken.
        ConfigError: a Hugging Face model that cannot be converted.
    """
    with errors_reach_all_ranks():
        folder = model_folder(path, bare=bare)
        if is_hub_name(path, bare=bare) or is_hf_folder(folder):
            return StartWeights(folder=folder, hf=open_hf_model(folder))
        return StartWeights(folder=find_checkpoint(folder))


def load_any_policy(path: str, parallel: ParallelConfig, precision: PrecisionConfig, ranks: Any) -> Policy:
    """The model of a checkpoint or of a Hugging Face model, on this layout, for scoring.

    Raises:
        CheckpointError: see :func:`find_weights`.
        ConfigError: the layout does not fit the model.
    """
    weights = find_weights(path)
    if weights.hf is None:
        return load_policy(weights.folder, parallel, precision, ranks)
    policy = build_policy(weights.hf.model, parallel, precision, ranks, seed=None, training=False)
    weights.load_into(policy)
    return policy
