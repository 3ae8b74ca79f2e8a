"""Folders of distributed checkpoints: where they are, which is the latest, what they say beside their tensors.

Megatron's layout: ``ROOT/iter_0000100/`` and ``ROOT/latest_checkpointed_iteration.txt``, which is written last, so that
an interrupted save is never taken for a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = 1
# Megatron's and pickle's own kinds, and the one of torch's loader, which is no Exception.
LOAD_ERRORS = (Exception, CheckpointException)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is; with the seed, all that the data order needs."""

    iteration: int = 0
    consumed_groups: int = 0


def iteration_folder(root: Path, iteration: int) -> Path:
    """``ROOT/iter_0000100``."""
    return root / f"iter_{iteration:07d}"


def latest_iteration(root: Path) -> int | None:
    """What the tracker names, or ``None`` without one.

    Raises:
        CheckpointError: the tracker is not a number, or its folder is gone.
    """
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker}: must hold an iteration number, found {text!r}; restore or delete the file")
    if not iteration_folder(root, int(text)).is_dir():
        raise CheckpointError(
            f"{tracker} names iteration {text}, but {iteration_folder(root, int(text))} is missing; "
            "write the number of an existing iter_ folder into it"
        )
    return int(text)


def find_checkpoint(path: Path) -> Path:
    """The folder to load: ``path`` itself when it is an ``iter_`` folder, else the latest under it.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "metadata.json").exists():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such folder")
    iteration = latest_iteration(path)
    if iteration is None:
        raise CheckpointError(f"no checkpoint at {path}: neither {TRACKER} nor metadata.json is there")
    return iteration_folder(path, iteration)


def read_common(folder: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: ``model``, ``config``, ``iteration``, ``consumed_groups``.

    Raises:
        CheckpointError: not a checkpoint of this package, or unreadable.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be read as a distributed checkpoint ({last_line(error)})") from error
    if common.get("groupdpo_format") != FORMAT:
        raise CheckpointError(
            f"{folder} was not written by this package (groupdpo_format {common.get('groupdpo_format')!r}, "
            f"needed {FORMAT}); convert it from its Hugging Face form"
        )
    return common


def weights_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's weights: that of its word embedding."""
    tensors: Any = dist_checkpointing.load_tensors_metadata(str(folder))
    return tensors["embedding.word_embeddings.weight"].dtype


def check_same_model(folder: Path, common: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose architecture differs, naming every field that does."""
    # A checkpoint of an older version lacks the fields added since, which then had their defaults.
    saved = {field.name: field.default for field in dataclasses.fields(ModelConfig)} | common["model"]
    differ = [
        f"{name}: checkpoint {saved.get(name)!r}, run {value!r}"
        for name, value in model.items()
        if saved.get(name) != value
    ]
    if differ:
        raise CheckpointError(
            f"{folder} is a checkpoint of another model ({'; '.join(differ)}); make the model section agree"
        )


def last_line(error: BaseException) -> str:
    """Of its message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
