"""An export changes what the run changed and nothing else, stops where training stops, and older readers take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint, export_hf
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.importing import ImportOptions, import_hf, kept_of
from megatron_groupdpo.convert.weights.loading import load_hf_weights
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.mcore.policy import build_policy
from megatron_groupdpo.mcore.setup import Ranks

OwnCopy = Callable[[str], Path]
LLAMA3 = {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 40}


def old_config(folder: Path) -> str:
    """config.json as transformers 4 wrote it for Llama 3.1, its keys in an order of their own."""
    config = json.loads((folder / "config.json").read_text())
    rope = {**LLAMA3, "rope_type": "llama3"}
    config = {"vocab_size": 101, "torch_dtype": "float32", "rope_theta": 5000.0, "rope_scaling": rope} | config
    del config["rope_parameters"], config["dtype"]
    text = json.dumps(config, indent=3)
    (folder / "config.json").write_text(text)
    return text


def test_a_configuration_of_transformers_4_comes_back_byte_for_byte(own_copy: OwnCopy, ranks: Ranks, tmp_path: Path):
    folder = own_copy("llama3-scaled")
    text = old_config(folder)
    generation = '{"eos_token_id": 5,   "top_p": 0.9, "_from_model_config": true}'
    (folder / "generation_config.json").write_text(generation)
    import_hf(folder, tmp_path / "checkpoint", ImportOptions(), ranks)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", ExportOptions())
    assert (tmp_path / "back" / "config.json").read_text() == text
    assert (tmp_path / "back" / "generation_config.json").read_text() == generation
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bf16", ExportOptions(dtype="bf16"))
    changed = text.replace('"torch_dtype": "float32"', '"torch_dtype": "bfloat16"')
    assert (tmp_path / "bf16" / "config.json").read_text() == changed != text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("generation", ['{"top_p": 0.9, "eos_token_id": 77}', '{"top_k": 7}', None, "not kept"])
def test_generation_stops_at_what_ends_the_trained_responses(
    own_copy: OwnCopy, ranks: Ranks, tmp_path: Path, generation: str | None
):
    """As of a base model that was trained with a chat template: its own end token never comes."""
    folder = own_copy("llama-tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 77}))
    (folder / "generation_config.json").unlink()
    if generation not in (None, "not kept"):
        (folder / "generation_config.json").write_text(generation)
    source = open_hf_model(folder)
    policy = build_policy(source.model, ParallelConfig(), PrecisionConfig(), ranks, seed=0, training=False)
    load_hf_weights(folder, policy)
    prompt = torch.tensor([[3, 4, 5]])
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    free = AutoModelForCausalLM.from_pretrained(folder).generate(prompt, **how, eos_token_id=[])[0].tolist()
    end = free[5]
    assert 77 not in free
    kept = None if generation == "not kept" else kept_of(source)
    report = export_hf(policy, tmp_path / "out", ExportOptions(), tokenizer=None, kept=kept, response_ends=[end])
    assert f"[{end}]" in report.notes[0]
    assert kept is None or "[77]" in report.notes[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(prompt, **how)[0].tolist() == free[: free.index(end, 3) + 1]
    written = (tmp_path / "out" / "generation_config.json").read_text()
    stops = json.loads(written)["eos_token_id"]
    assert stops == (end if kept is None else [77, end])
    if generation is not None and "77" in generation:
        assert written == generation.replace("77", f"[77, {end}]"), "nothing else"
    again = export_hf(policy, tmp_path / "same", ExportOptions(), tokenizer=None, kept=kept)
    assert again.notes == ()


def saved_tokenizers(folder: Path, sentencepiece_model: Path) -> list[Path]:
    """One of each kind that is written anew, not copied."""
    (folder / "chat.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    options = TokenizerOptions(
        kind="SentencePieceTokenizer", model=str(sentencepiece_model), chat_template=str(folder / "chat.jinja")
    )
    first = load_tokenizer(options)
    first.save(folder / "sentencepiece")
    backend = PreTrainedTokenizerFast.from_pretrained(folder / "sentencepiece")
    backend.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", special=True)]})
    backend.save_pretrained(folder / "new")
    load_tokenizer(TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder / "new"))).save(folder / "saved")
    return [folder / "sentencepiece", folder / "saved"]


TEXT = "Q: 12 + 3 = ?\nA: the sum is 15"


def test_saved_tokenizers_name_what_transformers_4_knows(sentencepiece_model: Path, tmp_path: Path):
    for folder in saved_tokenizers(tmp_path, sentencepiece_model):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast", folder
        assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & config.keys()
        assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][0] == 1
    assert config["additional_special_tokens"] == ["<|turn|>"]
    read = AutoTokenizer.from_pretrained(folder)
    assert read.encode("<|turn|>", add_special_tokens=False) == [101]
    assert 101 in read.all_special_ids


@pytest.mark.slow
def test_the_last_transformers_4_reads_what_is_saved(sentencepiece_model: Path, tmp_path: Path):
    """In an environment of its own, which is made here."""
    import venv

    folders = saved_tokenizers(tmp_path, sentencepiece_model)
    named = os.environ.get("GROUPDPO_TRANSFORMERS_4")
    python = Path(named) if named else tmp_path / "old" / "bin" / "python"
    if not named:
        venv.create(tmp_path / "old", with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "transformers==4.57.6", "sentencepiece", "jinja2"]
        done = subprocess.run(install, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(f"transformers 4.57.6 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    script = (
        "import sys, json; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = t.apply_chat_template([{'role': 'user', 'content': 'Q: 1'}], tokenize=True, return_dict=False)\n"
        "print(json.dumps([t(sys.argv[2])['input_ids'], chat, sorted(t.all_special_ids)]))"
    )
    for folder in folders:
        answers = [
            subprocess.run([str(one), "-c", script, str(folder), TEXT], capture_output=True, text=True, check=False)
            for one in (python, sys.executable)
        ]
        old, new = (json.loads(answer.stdout or "null") for answer in answers)
        assert old is not None, answers[0].stderr
        assert new is not None, answers[1].stderr
        assert old[0] == new[0]
        assert old[2] == new[2]
        assert old[1][0] == 1
        assert old[1][-1] == 2
