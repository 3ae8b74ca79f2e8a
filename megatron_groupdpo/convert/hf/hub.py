"""A model on the Hugging Face hub, by its name in place of a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_groupdpo.errors import CheckpointError

PREFIX = "hf://"
_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"
WANTED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",  # so that an adapter is refused as one
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Files of a repository that a conversion reads; others (weights in other forms, most of all) are not fetched."""


def is_hub_name(text: str, *, bare: bool = True) -> bool:
    """Whether the text names a model on the hub: ``hf://org/name``, or ``org/name`` where no such folder is.

    A revision may follow after an @.

    Args:
        text: what the user gave.
        bare: False takes only the form with the prefix, where a folder need not exist yet.
    """
    if text.startswith(PREFIX):
        return True
    return bare and re.fullmatch(_NAME, text) is not None and not Path(text).exists()


def model_folder(text: str, *, bare: bool = True) -> Path:
    """The folder of a model: the given one, or what the hub's cache holds once its files are fetched.

    Environment variables are those of ``huggingface_hub``: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.

    Raises:
        CheckpointError: not a name; the hub does not serve it; offline, and not in the cache.
    """
    if not is_hub_name(text, bare=bare):
        return Path(text)
    name = text.removeprefix(PREFIX)
    if re.fullmatch(_NAME, name) is None:
        raise CheckpointError(f"{text} is not a name on the hub; write it as {PREFIX}organisation/model")
    name, _, revision = name.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
    except LocalEntryNotFoundError as error:
        cause = "HF_HUB_OFFLINE is set" if _is_offline() else _first_line(error.__cause__ or error)
        raise CheckpointError(
            f"{text}: no such folder, and the hub cannot be reached for it ({cause}) nor is it in the hub's cache; "
            "give the folder of a model, or fetch it on a machine with access"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{text}: no such folder, and the hub does not serve it ({_first_line(error)}); correct the name, or "
            "set HF_TOKEN if it is private or gated"
        ) from None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
