"""Weights that a run or a tool starts from: a distributed checkpoint, or a Hugging Face model, read on the fly."""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron_groupdpo.errors import CheckpointError, DataError
from megatron_groupdpo.mcore.checkpoint.folders import check_same_model as check_same_checkpoint
from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint, read_common
from megatron_groupdpo.mcore.checkpoint.training import load_weights
from megatron_groupdpo.mcore.policy import Policy, build_policy, load_policy, model_identity
from megatron_groupdpo.processes import errors_reach_all_ranks

_REMEDY = "preprocess the data with the model's tokenizer"


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

    def own_tokenizer(self, chat_template: str | None = None) -> dict[str, Any] | None:
        """What is recorded of the tokenizer that goes with the weights; None where none does.

        Args:
            chat_template: a file, in place of the template of a Hugging Face model.

        Raises:
            CheckpointError: a Hugging Face model's tokenizer cannot be loaded.
        """
        if self.hf is None:
            recorded = read_common(self.folder)["config"].get("tokenizer")
            return tokenizers.where_it_is_now(recorded, self.folder) if recorded else None
        try:
            return tokenizers.of_folder(self.folder, chat_template)
        except DataError as error:
            raise CheckpointError(
                f"{self.folder} has a tokenizer that cannot be loaded and so not be compared with the data's: {error}; "
                "put it right, or take its files out of the folder if the data's is the model's"
            ) from None

    def check_tokenizers(self, data: Sequence[dict[str, Any]]) -> bool:
        """Whether the weights have a tokenizer of their own.

        Raises:
            CheckpointError: one of the data's is not that.
        """
        own = self.own_tokenizer()
        for recorded in data:
            tokenizers.check_same(recorded, own, f"{self}", remedy=_REMEDY)
        return own is not None

    def tokenizer_with(self, data: dict[str, Any], own: dict[str, Any] | None) -> dict[str, Any]:
        """The tokenizer that a run records and exports: the weights' own, with the chat template of the data.

        Args:
            data: what the token stores say of theirs; it is taken where the weights have none of their own.
            own: see :meth:`own_tokenizer`.

        Raises:
            CheckpointError: the weights' own is not the data's.
        """
        tokenizers.check_same(data, own, f"{self}", remedy=_REMEDY)
        if own is None or own["digest"] == data["digest"] or "identity" not in data or "identity" not in own:
            return data
        template = data["identity"]["chat_template"]
        if template in (None, own["identity"]["chat_template"]):
            return own if Path(own["model"]).exists() else data
        is_of_files = self.hf is not None and data["chat_template"] is not None
        return (self.own_tokenizer(data["chat_template"]) if is_of_files else None) or data


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


def load_any_policy(
    path: str,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    ranks: Any,
    *,
    tokenizers_of_data: Sequence[dict[str, Any]] = (),
) -> Policy:
    """The model of a checkpoint or of a Hugging Face model, on this layout, for scoring.

    Args:
        path: see :func:`find_weights`.
        parallel: the layout.
        precision: of the passes.
        ranks: of this process.
        tokenizers_of_data: what the stores to be scored say of theirs, where that has not been checked.

    Raises:
        CheckpointError: see :func:`find_weights`; or the data's tokenizer is not the model's.
        ConfigError: the layout does not fit the model.
    """
    weights = find_weights(path)
    if tokenizers_of_data:
        with errors_reach_all_ranks():
            has_own = weights.check_tokenizers(tokenizers_of_data)
        if not has_own and ranks.is_logger:
            print(f"{weights} has no tokenizer of its own; the data's is taken to be it", flush=True)
    if weights.hf is None:
        return load_policy(weights.folder, parallel, precision, ranks)
    policy = build_policy(weights.hf.model, parallel, precision, ranks, seed=None, training=False)
    weights.load_into(policy)
    return policy
