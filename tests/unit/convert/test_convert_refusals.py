"""Each thing that can be wrong with a conversion: one message that names it, and nothing written."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import tensors_of
from hf_examples import SCALED, random_model
from safetensors.torch import save_file

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert import verify
from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint, export_hf, parse_size
from megatron_groupdpo.convert.families import FAMILIES, family_for_export
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.importing import ImportOptions, import_hf, prepare_import
from megatron_groupdpo.convert.weights.loading import load_hf_weights
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_groupdpo.mcore.policy import build_policy
from megatron_groupdpo.mcore.setup import Ranks

OwnCopy = Callable[[str], Path]
FC1, FC2 = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def refused(folder: Path, error: type[UserError], *words: str) -> None:
    """Opening raises one message with all the words; importing writes nothing, not even beside the target."""
    output = folder.parent / "written" / "checkpoint"
    with pytest.raises(error) as caught:
        prepare_import(folder, output, ImportOptions())
    assert all(word in str(caught.value) for word in (str(folder), *words)), str(caught.value)
    assert not output.parent.exists()


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_unknown_architecture_is_answered_with_the_nearest_and_all(own_copy: OwnCopy):
    folder = own_copy("llama-tied")
    edit_config(folder, architectures=["LLamaForCausalLm"])
    refused(folder, ConfigError, "did you mean 'LlamaForCausalLM'?", "GPT2LMHeadModel")
    edit_config(folder, architectures=None, model_type="mamba")
    refused(folder, ConfigError, "model_type", "'mamba'", "llama, qwen2", "gpt2")
    edit_config(folder, model_type=None)
    refused(folder, ConfigError, "names no architecture")


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        (
            "llama-tied",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type is 'dynamic'",
        ),
        ("llama-tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}}, "rope_theta is 10000.5"),
        ("llama-tied", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen3", {"rope_parameters": SCALED["yarn"] | {"truncate": False}}, "rope_parameters.truncate is False"),
        ("qwen3", {"rope_parameters": SCALED["yarn"] | {"mscale": 0.7}}, "rope_parameters.mscale is 0.7"),
        ("llama-tied", {"rope_parameters": SCALED["linear"] | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama-tied", {"sliding_window": 32}, "sliding_window is 32"),
        ("llama-tied", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama-tied", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama-tied", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("llama-tied", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama-tied", {"attention_bias": True}, "mlp_bias is False"),
        ("llama-tied", {"num_attention_heads": "six"}, "num_attention_heads"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3-windows", {"layer_types": ["sliding_attention"] * 3}, "number of `layer_types` (3)"),
        ("qwen3-windows", {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types is"),
        (
            "qwen2-tied",
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False},
            "sliding_window is None",
        ),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ("llama-tied", {"num_key_value_heads": 4}, "6 attention heads must be a multiple of 4 key-value heads"),
        ("llama-tied", {"intermediate_size": -80}, "ffn_hidden_size -80"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, of 4 experts"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_a_field_that_cannot_be_expressed_is_named(own_copy: OwnCopy, name: str, fields: dict[str, Any], named: str):
    folder = own_copy(name)
    edit_config(folder, **fields)
    refused(folder, ConfigError, named)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ("missing tensor 'model.layers.1.mlp.up_proj.weight'",)),
        (lambda t: t.update({"model.vision.weight": torch.ones(2)}), ("unexpected tensor 'model.vision.weight'",)),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(47)}),
            ("'model.norm.weight' has shape [47]", "asks for [48]"),
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), ("'model.norm.weight'", "I8")),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(101, 48)}),
            ("'lm_head.weight'", "differ", "tie_word_embeddings"),
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(own_copy: OwnCopy, change: Callable[..., Any], words: tuple[str, ...]):
    folder = own_copy("llama-tied")
    edit_tensors(folder, change)
    refused(folder, CheckpointError, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({FC2: t[FC2][:3].clone()}), ("missing tensor", "experts.3.down_proj.weight'")),
        (lambda t: t.update({FC1: torch.ones(5, 32, 48)}), ("unexpected tensors", "experts.4.gate_proj.weight'")),
        (lambda t: t.update({FC1: t[FC1][:, 1:].clone()}), (f"(a part of '{FC1}') has shape [15, 48]", "[16, 48]")),
        (lambda t: t.update({FC2 + "s": torch.ones(2)}), (f"unexpected tensor '{FC2}s'",)),
        (
            lambda t: t.update({FC2.replace("experts.", "experts.1.") + ".weight": torch.ones(48, 16)}),
            (f"holds both '{FC2}' and its part", "experts.1.down_proj.weight'"),
        ),
    ],
)
def test_joined_experts_that_do_not_fit_are_named(tmp_path: Path, change: Callable[..., Any], words: tuple[str, ...]):
    folder = tmp_path / "joined"
    random_model("qwen3-moe").save_pretrained(folder, save_original_format=False)
    edit_tensors(folder, change)
    refused(folder, CheckpointError, *words)


def test_many_missing_tensors_are_counted_not_listed(own_copy: OwnCopy):
    folder = own_copy("llama-tied")
    edit_config(folder, num_hidden_layers=4)
    refused(folder, CheckpointError, "missing tensors 'model.layers.2.", "and 15 more")


def test_broken_files_are_named(own_copy: OwnCopy):
    folder = own_copy("llama-tied")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(folder, CheckpointError, "model.safetensors", "not a whole safetensors file")
    weights.write_bytes(b"no safetensors")
    refused(folder, CheckpointError, "model.safetensors", "not a whole safetensors file")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    refused(folder, CheckpointError, "model-00001-of-00001.safetensors", "missing")
    (folder / "model-00001-of-00001.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"model.nom.weight": "model-00001-of-00001.safetensors"}}))
    refused(folder, CheckpointError, "lacks the tensor 'model.nom.weight'")
    index.write_text("{")
    refused(folder, CheckpointError, "model.safetensors.index.json", "not an index")
    (folder / "config.json").write_text("{")
    refused(folder, ConfigError, "config.json", "not JSON")


def test_a_broken_generation_config_is_refused_before_anything_is_made(own_copy: OwnCopy):
    folder = own_copy("llama-tied")
    (folder / "generation_config.json").write_text("{")
    refused(folder, CheckpointError, "generation_config.json is not JSON")


def test_a_folder_without_safetensors_is_refused_with_a_way_out(own_copy: OwnCopy):
    folder = own_copy("llama-tied")
    (folder / "model.safetensors").unlink()
    refused(folder, CheckpointError, "neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, CheckpointError, ".bin", "save_pretrained")


def test_a_gguf_file_is_refused_as_one(own_copy: OwnCopy):
    folder = own_copy("llama-tied")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, CheckpointError, "GGUF", "original model")
    refused(folder / "model.gguf", CheckpointError, "GGUF")
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "GGUF")


def test_an_index_that_does_not_fit_its_files_is_refused(own_copy: OwnCopy):
    """A tensor in another file than it says, a tensor it forgot, a path out of the folder."""
    folder = own_copy("llama-tied")
    tensors = tensors_of(folder)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({name: tensors[name] for name in names[:3]}, folder / first)
    save_file({name: tensors[name] for name in names[3:]} | {"model.vision": torch.ones(2)}, folder / second)
    weight_map = dict.fromkeys(names[:3], first) | dict.fromkeys(names[3:], second)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: second}}))
    refused(folder, CheckpointError, second, f"lacks the tensor '{names[0]}'")
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, CheckpointError, "unexpected tensor 'model.vision'")
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "../secret.safetensors"}}))
    refused(folder, CheckpointError, "'../secret.safetensors', which is not a file of this folder")


def test_what_is_no_model_folder_is_refused(own_copy: OwnCopy, tmp_path: Path):
    refused(tmp_path / "absent", CheckpointError, "does not exist")
    folder = own_copy("llama-tied")
    refused(folder / "config.json", CheckpointError, "is a file")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, CheckpointError, "adapter", "merge_and_unload")
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "no config.json")


@pytest.mark.acts("ImportOptions.with_tokenizer")
def test_a_tokenizer_larger_than_the_embedding_is_refused(own_copy: OwnCopy, sentencepiece_model: Path):
    folder = own_copy("gpt2")
    edit_config(folder, vocab_size=99)
    edit_tensors(folder, lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:99].clone()}))
    load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model))).save(folder)
    refused(folder, DataError, "101 tokens", "99 rows", "--tokenizer")
    source, _, tokenizer = prepare_import(folder, folder.parent / "out", ImportOptions(with_tokenizer=False))
    assert source.model.vocab_size == 99
    assert tokenizer is None


def test_weights_of_another_model_are_not_loaded_into_a_policy(own_copy: OwnCopy, ranks: Ranks):
    folder = own_copy("llama-tied")
    model = open_hf_model(folder).model
    policy = build_policy(model, ParallelConfig(), PrecisionConfig(), ranks, seed=0, training=False)
    before = policy.weights_digest()
    edit_config(folder, rms_norm_eps=1e-6)
    with pytest.raises(ConfigError, match=re.escape("norm_epsilon: 1e-06 there, 0.001 in the model section")):
        load_hf_weights(folder, policy)
    assert policy.weights_digest() == before


def test_a_model_of_no_family_is_refused_with_each_ones_reason():
    model = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_query_groups=2, kv_channels=4, ffn_hidden_size=8,
        vocab_size=8, position_embedding_type="rope", normalization="LayerNorm",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"llama has normalization 'RMSNorm'.*gpt2 has position_embedding_type"):
        family_for_export(model)


def test_families_have_names_of_their_own():
    for field in ("name", "architecture", "model_type"):
        assert len({getattr(family, field) for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.acts("ExportOptions.overwrite", "ImportOptions.overwrite")
def test_an_output_that_is_there_is_kept_unless_asked(own_copy: OwnCopy, ranks: Ranks, tmp_path: Path):
    folder, target = own_copy("gpt2"), tmp_path / "target"
    source = open_hf_model(folder)
    policy = build_policy(source.model, ParallelConfig(), PrecisionConfig(), ranks, seed=0, training=False)
    target.mkdir()
    (target / "letter.txt").write_text("dear")
    for overwrite, words in ((False, "pass --overwrite"), (True, "folders with a config.json only")):
        with pytest.raises(CheckpointError, match=words):
            export_hf(policy, target, ExportOptions(overwrite=overwrite), tokenizer=None)
        with pytest.raises(CheckpointError, match=words.replace("config.json", "latest_checkpointed_iteration.txt")):
            import_hf(folder, target, ImportOptions(overwrite=overwrite), ranks)
    assert [path.name for path in target.iterdir()] == ["letter.txt"]
    (target / "config.json").write_text("{}")
    export_hf(policy, target, ExportOptions(overwrite=True), tokenizer=None)
    assert not (target / "letter.txt").exists()
    assert (target / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="must not be the input"):
        import_hf(folder, folder / "checkpoint", ImportOptions(overwrite=True), ranks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "target"]


def test_a_disk_that_fails_half_way_leaves_nothing(own_copy: OwnCopy, ranks: Ranks, tmp_path: Path):
    policy = build_policy(
        open_hf_model(own_copy("gpt2")).model, ParallelConfig(), PrecisionConfig(), ranks, seed=0, training=False
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # config.json fits, the weights do not
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            export_hf(policy, tmp_path / "target", ExportOptions(), tokenizer=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


@pytest.mark.acts("ImportOptions.tokenizer")
def test_a_tokenizer_that_has_gone_or_changed_is_not_guessed(
    own_copy: OwnCopy, ranks: Ranks, tmp_path: Path, sentencepiece_model: Path
):
    folder, checkpoint = own_copy("gpt2"), tmp_path / "checkpoint"
    import_hf(folder, checkpoint, ImportOptions(tokenizer=str(sentencepiece_model)), ranks)
    (checkpoint / "tokenizer" / "chat_template.jinja").write_text("another")
    with pytest.raises(CheckpointError, match="has changed since"):
        export_checkpoint(checkpoint, tmp_path / "out", ExportOptions())
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be used.*--tokenizer, or pass --no-tokenizer"):
        export_checkpoint(checkpoint, tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()
    given = export_checkpoint(checkpoint, tmp_path / "out", ExportOptions(), tokenizer=str(sentencepiece_model))
    assert given.has_tokenizer


def test_sizes_of_files():
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "700", "2KB")] == [5 * 10**9, 1_500_000, 700, 2000]
    for text in ("", "GB", "5 gigs", "-1MB", "0"):
        with pytest.raises(ConfigError, match="--max-shard-size"):
            parse_size(text)


def test_a_comparison_fails_above_its_tolerance_and_on_numbers_that_are_none(tmp_path: Path):
    sequences = verify.random_sequences(11, count=2, length=4, seed=0)
    theirs = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.0, -3.0])]
    ours = [theirs[0].clone(), torch.tensor([-1.0, -2.5, -3.0])]
    result = verify.compare(sequences, theirs, ours, tolerance=0.4)
    assert not result.passed
    assert verify.compare(sequences, theirs, ours, tolerance=0.5).passed
    assert verify.compare(sequences, theirs, ours, tolerance=0.5, mean_tolerance=0.09).passed
    assert not verify.compare(sequences, theirs, ours, tolerance=0.5, mean_tolerance=0.08).passed
    assert (result.max_difference, result.mean_difference) == (0.5, 0.5 / 6)
    assert (result.worst.sequence, result.worst.position) == (1, 2)
    assert result.worst.token_id == sequences[1][2]
    ours[0][2] = float("nan")
    broken = verify.compare(sequences, theirs, ours, tolerance=0.5)
    assert not broken.passed
    assert not verify.compare(sequences, theirs, ours, tolerance=math.inf, mean_tolerance=math.inf).passed
    assert (broken.worst.sequence, broken.worst.position, broken.worst.megatron) == (0, 3, None)
    verify.write_report(tmp_path / "new" / "report.json", broken, hf="x")
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["hf"] == "x"
    assert report["max_difference"] is None


@pytest.mark.costly
def test_the_command_exits_with_1_and_one_line(
    tool: Callable[..., Any], repository: Path, hf_models: Callable[..., Path], tmp_path: Path
):
    absent = tool("convert_checkpoint", "import", "--hf", tmp_path / "absent", "--save", tmp_path / "out")
    assert absent.returncode == 1
    assert absent.stderr == f"error: {tmp_path / 'absent'} does not exist; give the folder of a Hugging Face model\n"
    # In a process of its own, which ends without an end of its process groups.
    report = tmp_path / "report.json"
    verify = [sys.executable, str(repository / "tools" / "convert_checkpoint.py"), "verify"]
    verify += ["--hf", str(hf_models("llama-tied")), "--tolerance", "1e-12", "--num-sequences", "2"]
    command = [*verify, "--report", str(report)]
    verified = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert verified.returncode == 1
    assert "differ by more than 1e-12" in verified.stderr
    assert "Traceback" not in verified.stderr
    assert 0 < json.loads(report.read_text())["max_difference"] < 1e-5
