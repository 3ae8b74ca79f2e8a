"""A Hugging Face folder from the outside: its files' names, and whether a folder is one. Nothing is opened here.

A command line that names a checkpoint asks this before PyTorch is imported.
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder is meant as a Hugging Face model, not as a distributed checkpoint."""
    if (folder / "latest_checkpointed_iteration.txt").exists() or (folder / "metadata.json").exists():
        return False
    names = (CONFIG, "adapter_config.json", WEIGHTS, INDEX)
    return folder.suffix == ".gguf" or any((folder / name).exists() for name in names)
