"""Options of an import and an export, in what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint
from megatron_groupdpo.convert.importing import ImportOptions, import_hf
from megatron_groupdpo.mcore.setup import Ranks

HfModels = Callable[..., Path]


@pytest.mark.acts("ImportOptions.dtype", "ExportOptions.family")
def test_weights_are_imported_rounded_and_exported_as_the_family_asked_for(
    hf_models: HfModels, ranks: Ranks, tmp_path: Path
):
    """A Llama without biases is also a Mistral."""
    folder = hf_models("llama-tied")
    assert import_hf(folder, tmp_path / "in", ImportOptions(dtype="bf16"), ranks).dtype == torch.bfloat16
    export_checkpoint(tmp_path / "in", tmp_path / "out", ExportOptions(family="mistral", dtype="fp32"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(torch.bfloat16).float()), name
