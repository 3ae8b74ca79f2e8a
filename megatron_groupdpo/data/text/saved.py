"""Tokenizer files that transformers 4 reads, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names of transformers 5 that are new names of one class."""
_ONLY_NEW = ("backend", "is_local", "local_files_only")
"""What transformers 5 notes of how it read the tokenizer; nothing reads it again."""


def save_for_all_readers(tokenizer: Any, folder: Path) -> None:
    """``save_pretrained``, with the names in tokenizer_config.json that AutoTokenizer of transformers 4 and 5 know."""
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    written = config.get("tokenizer_class")
    config["tokenizer_class"] = _CLASSES.get(written, written)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 has a mapping of that name, and this name for a list
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    for name in _ONLY_NEW:
        config.pop(name, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
