"""What the tests of this folder read files with."""

from __future__ import annotations

from pathlib import Path

from hf_examples import CONFIGS
from safetensors.torch import load_file
from torch import Tensor

CONFIG_NAMES = tuple(CONFIGS)


def files_of(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, whatever its files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in files_of(file).items()}
