"""Both sides compute one function, and what goes in comes out bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_helpers import CONFIG_NAMES, files_of, tensors_of
from hf_examples import random_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.load import Given
from megatron_groupdpo.convert import verify
from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint, export_hf
from megatron_groupdpo.convert.hf.files import HfWeights
from megatron_groupdpo.convert.hf.folder import INDEX
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.hf.model_section import complete_model_section
from megatron_groupdpo.convert.hf.tokenizers import ModelTokenizer
from megatron_groupdpo.convert.importing import MODEL_YAML, ImportOptions, import_hf, kept_of
from megatron_groupdpo.convert.tensors.megatron_names import canonical_name, megatron_tensors
from megatron_groupdpo.convert.weights.loading import key_of, load_hf_weights, policy_shards
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.policy import Policy, build_policy, load_policy
from megatron_groupdpo.mcore.setup import Ranks

HfModels = Callable[..., Path]
CLOSE = 1e-5


def loaded(folder: Path, ranks: Ranks) -> Policy:
    model = open_hf_model(folder).model
    policy = build_policy(model, ParallelConfig(), PrecisionConfig(), ranks, seed=0, training=False)
    load_hf_weights(folder, policy)
    return policy


def test_the_dropout_of_a_hugging_face_model_stays_behind(hf_models: HfModels, ranks: Ranks):
    """GPT-2's configuration has 0.1 by default; both passes of training must see one function."""
    folder = hf_models("gpt2")
    config = json.loads((folder / "config.json").read_text())
    assert config["resid_pdrop"] == config["attn_pdrop"] == config["embd_pdrop"] == 0.1
    policy = loaded(folder, ranks)
    assert (policy.config.hidden_dropout, policy.config.attention_dropout) == (0.0, 0.0)
    assert not [m.p for chunk in policy.chunks for m in chunk.modules() if isinstance(m, torch.nn.Dropout) and m.p]


@pytest.mark.acts(
    "ModelConfig.num_layers",
    "ModelConfig.hidden_size",
    "ModelConfig.num_attention_heads",
    "ModelConfig.ffn_hidden_size",
    "ModelConfig.num_query_groups",
    "ModelConfig.kv_channels",
    "ModelConfig.max_position_embeddings",
    "ModelConfig.position_embedding_type",
    "ModelConfig.rotary_base",
    "ModelConfig.rotary_base_local",
    "ModelConfig.rope_scaling_type",
    "ModelConfig.rope_scaling_factor",
    "ModelConfig.rope_scaling_original_length",
    "ModelConfig.rope_scaling_low_freq_factor",
    "ModelConfig.rope_scaling_high_freq_factor",
    "ModelConfig.rope_scaling_beta_fast",
    "ModelConfig.rope_scaling_beta_slow",
    "ModelConfig.rope_scaling_attention_factor",
    "ModelConfig.window_size",
    "ModelConfig.window_attn_skip_freq",
    "ModelConfig.normalization",
    "ModelConfig.norm_position",
    "ModelConfig.apply_layernorm_1p",
    "ModelConfig.norm_epsilon",
    "ModelConfig.swiglu",
    "ModelConfig.gated_linear_unit",
    "ModelConfig.activation",
    "ModelConfig.add_bias_linear",
    "ModelConfig.add_qkv_bias",
    "ModelConfig.qk_layernorm",
    "ModelConfig.qk_layernorm_across_heads",
    "ModelConfig.softmax_scale",
    "ModelConfig.scale_embeddings",
    "ModelConfig.untie_embeddings_and_output_weights",
    "ModelConfig.vocab_size",
    "ModelConfig.num_moe_experts",
    "ModelConfig.moe_ffn_hidden_size",
    "ModelConfig.moe_router_topk",
    "ModelConfig.moe_router_pre_softmax",
    "ModelConfig.moe_layer_freq",
)
@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_log_probs_of_every_token_equal_those_of_transformers(name: str, hf_models: HfModels, ranks: Ranks):
    folder = hf_models(name)
    sequences = [
        *verify.random_sequences(101, count=3, length=64, seed=0),
        *verify.random_sequences(101, count=1, length=9, seed=1),
    ]
    theirs = verify.transformers_logprobs(folder, sequences)
    ours = verify.megatron_logprobs(loaded(folder, ranks), sequences)
    assert ours is not None
    assert max(float(t.max() - t.min()) for t in theirs) > 1, "a model that says nothing would agree with anything"
    result = verify.compare(sequences, theirs, ours, tolerance=CLOSE)
    assert result.passed, verify.describe(result)
    assert result.num_tokens == 3 * 63 + 8


@pytest.mark.parametrize("name", ["qwen3", "olmoe"])
def test_in_bf16_a_model_is_held_to_the_rounding_of_transformers(
    name: str, own_copy: Callable[[str], Path], ranks: Ranks, tmp_path: Path
):
    """The mean tells what the largest difference hides: in a mixture, of a token that rounding sends elsewhere."""
    folder, checkpoint = own_copy(name), tmp_path / "checkpoint"
    import_hf(folder, checkpoint, ImportOptions(), ranks)
    sequences = verify.random_sequences(101, count=8, length=64, seed=0)

    def compared() -> verify.Comparison:
        return verify.verify_on_layout(
            open_hf_model(folder),
            checkpoint,
            sequences,
            parallel=ParallelConfig(),
            precision=PrecisionConfig(bf16=True),
            ranks=ranks,
        )

    good = compared()
    assert good.passed, verify.describe(good)
    tensors = tensors_of(folder)
    norm = "model.norm.weight"
    save_file(tensors | {norm: tensors[norm] * 1.06}, folder / "model.safetensors", {"format": "pt"})
    other = compared()
    assert not other.passed, verify.describe(other)
    assert other.max_difference is not None
    assert other.max_difference < other.tolerance, "so that the mean is what tells"


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_the_shared_table_of_tensors_is_what_the_model_has(name: str, hf_models: HfModels, ranks: Ranks):
    policy = loaded(hf_models(name), ranks)
    built = {}
    for shard in policy_shards(policy):
        shape = list(shard.global_shape[shard.prepend_axis_num :])
        if shard.allow_shape_mismatch:
            assert shape[0] == 128
            shape[0] = 101
        built[key_of(shard)[0]] = tuple(shape)
    assert built == megatron_tensors(policy.model)


def test_names_of_fused_layers_are_those_of_plain_ones():
    fused = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_name(fused) == "decoder.layers.input_layernorm.weight"
    assert canonical_name("decoder.layers.mlp.linear_fc1.layer_norm_bias") == "decoder.layers.pre_mlp_layernorm.bias"
    assert canonical_name("decoder.layers.mlp.linear_fc1.weight") == "decoder.layers.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CONFIG_NAMES), ("llama-tied", torch.bfloat16), ("gpt2", torch.float16)],
)
def test_import_then_export_gives_the_same_bytes(
    name: str, dtype: torch.dtype, hf_models: HfModels, ranks: Ranks, tmp_path: Path
):
    folder, back = hf_models(name, dtype), tmp_path / "back"
    import_hf(folder, tmp_path / "checkpoint", ImportOptions(), ranks)
    export_checkpoint(tmp_path / "checkpoint", back, ExportOptions(max_shard_size=30_000))
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert after[tensor_name].dtype == dtype
        assert after[tensor_name].shape == tensor.shape
        assert torch.equal(after[tensor_name], tensor), tensor_name
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert json.loads((back / "generation_config.json").read_text()) == json.loads(
        (folder / "generation_config.json").read_text()
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_that_files_join_come_back_one_by_one(name: str, hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    joined, back = tmp_path / "joined", tmp_path / "back"
    random_model(name).save_pretrained(joined, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(joined)
    source = open_hf_model(joined)
    for key, pair in source.plan.items():  # as ranks read that hold a part
        window = tuple(slice(size // 3, size) for size in pair.shape)
        part = torch.empty([size - size // 3 for size in pair.shape])
        source.read_into(part, key, window)
        assert torch.equal(part, source.read(key)[window]), key
    import_hf(joined, tmp_path / "checkpoint", ImportOptions(), ranks)
    export_checkpoint(tmp_path / "checkpoint", back, ExportOptions())
    assert (back / "model.safetensors").read_bytes() == (hf_models(name) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama-untied", "mixtral"])
def test_tensors_of_several_dtypes_come_back_each_in_its_own(
    name: str, hf_models: HfModels, ranks: Ranks, tmp_path: Path
):
    folder, back = tmp_path / "mixed", tmp_path / "back"
    shutil.copytree(hf_models(name), folder)
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    mixed = {name: tensor.to(kinds[index % 3]) for index, (name, tensor) in enumerate(tensors_of(folder).items())}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    import_hf(folder, tmp_path / "checkpoint", ImportOptions(), ranks)
    export_checkpoint(tmp_path / "checkpoint", back, ExportOptions())
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bf16", ExportOptions(dtype="bf16"))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_imported_in_bf16_loads_in_fp32_and_bf16(hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    folder = hf_models("llama-tied", torch.bfloat16)
    report = import_hf(folder, tmp_path / "checkpoint", ImportOptions(), ranks)
    assert report.dtype == torch.bfloat16
    for bf16 in (False, True):
        policy = load_policy(tmp_path / "checkpoint", ParallelConfig(), PrecisionConfig(bf16=bf16), ranks)
        shards = {canonical_name(shard.key): shard.data for shard in policy_shards(policy)}
        norm = tensors_of(folder)["model.norm.weight"]
        assert shards["decoder.final_layernorm.weight"].dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert torch.equal(shards["decoder.final_layernorm.weight"].to(torch.bfloat16), norm)


def test_the_precision_of_the_router_is_the_runs_own(hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    folder, out = hf_models("mixtral"), tmp_path / "out"
    # A command line without the fields that every run must give is refused before the model is looked at.
    given: Given = {("checkpoint", "load"): str(folder), ("model", "moe_router_dtype"): "fp32"}
    with pytest.raises(ConfigError, match=r"required and not given: data_path \(data\)"):
        complete_model_section(given)
    required = {("data", "data_path"): ("store",), ("data", "seq_length"): 64}
    given |= required | {("optimizer", "lr"): 1e-3, ("training", "global_batch_size"): 2}
    assert complete_model_section(given)["model", "moe_router_dtype"] == "fp32"
    source = open_hf_model(folder)
    model = dataclasses.replace(source.model, moe_router_dtype="fp32")
    policy = build_policy(model, ParallelConfig(), PrecisionConfig(bf16=True), ranks, seed=0, training=False)
    load_hf_weights(folder, policy)
    export_hf(policy, out, ExportOptions(), tokenizer=None, kept=kept_of(source))
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_rounded_export_is_verified_against_the_rounded_weights(hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    """As of a bf16 model that was trained in fp32: the weights are not those of the folder, but round to them."""
    import_hf(hf_models("llama-tied"), tmp_path / "checkpoint", ImportOptions(), ranks)
    sequences = verify.random_sequences(101, count=2, length=32, seed=3)
    results = []
    for dtype in ("bf16", "fp32"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / dtype, ExportOptions(dtype=dtype))
        source = open_hf_model(tmp_path / dtype)
        how = {"parallel": ParallelConfig(), "precision": PrecisionConfig(), "ranks": ranks}
        results.append(verify.verify_on_layout(source, tmp_path / "checkpoint", sequences, **how))
    assert [result.weights_rounded_to for result in results] == ["bfloat16", None]
    assert all(result.passed for result in results)
    assert "rounded to bfloat16" in verify.describe(results[0])


@pytest.mark.acts("ExportOptions.dtype")
def test_the_chosen_dtype_is_written(hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    policy = loaded(hf_models("llama-untied"), ranks)
    export_hf(policy, tmp_path / "bf16", ExportOptions(dtype="bf16"), tokenizer=None)
    written = tensors_of(tmp_path / "bf16")
    expected = tensors_of(hf_models("llama-untied"))
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_an_export_without_a_kept_configuration_is_the_same_model_to_transformers(
    name: str, hf_models: HfModels, ranks: Ranks, tmp_path: Path
):
    folder = hf_models(name)
    export_hf(loaded(folder, ranks), tmp_path / "out", ExportOptions(), tokenizer=None)
    sequences = verify.random_sequences(101, count=1, length=32, seed=3)
    (before,) = verify.transformers_logprobs(folder, sequences)
    (after,) = verify.transformers_logprobs(tmp_path / "out", sequences)
    assert torch.equal(before, after)


@pytest.mark.acts("ExportOptions.max_shard_size")
def test_files_keep_the_size_limit_and_the_index_names_each_tensor(hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    out = tmp_path / "out"
    limit = 101 * 48 * 4  # the embedding alone
    report = export_hf(
        loaded(hf_models("llama-untied"), ranks), out, ExportOptions(max_shard_size=limit), tokenizer=None
    )
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == report.num_files > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in map(files_of, files)]
    assert max(sizes) <= limit
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == report.num_bytes
    assert set(index["weight_map"]) == set(HfWeights(out).shapes) == set(tensors_of(hf_models("llama-untied")))
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.weight.shape == (101, 48)


def test_the_tokenizer_travels_with_the_model(
    hf_models: HfModels, ranks: Ranks, tmp_path: Path, sentencepiece_model: Path
):
    options = TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model))
    tokenizer = load_tokenizer(options)
    first, second = tmp_path / "first", tmp_path / "second"
    given = ModelTokenizer(tokenizer=tokenizer, options=options)
    export_hf(loaded(hf_models("llama-tied"), ranks), first, ExportOptions(), tokenizer=given)
    report = import_hf(first, tmp_path / "checkpoint", ImportOptions(), ranks)
    assert report.has_tokenizer
    # the folder of the import may go, and the checkpoint may move
    first.rename(tmp_path / "gone")
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    assert export_checkpoint(tmp_path / "moved", second, ExportOptions()).has_tokenizer
    text = "Q: 12 + 30 = ?"
    read = AutoTokenizer.from_pretrained(second)
    assert read(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    config = json.loads((second / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    model = AutoModelForCausalLM.from_pretrained(second)
    assert model.generation_config.eos_token_id == 2
    assert model.generate(**read(text, return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[0] == 1


def test_weights_saved_without_the_head_are_found_and_buffers_passed_over(own_copy: Callable[[str], Path]):
    folder = own_copy("gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, device="cpu")
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_hf_model(folder)
    assert source.ignored == ("h.0.attn.bias", "lm_head.weight")
    assert torch.equal(source.read(("embedding.word_embeddings.weight", None)), tensors["wte.weight"])


@pytest.mark.acts("ImportOptions.make_vocab_size_divisible_by")
def test_the_model_section_beside_an_import_is_the_checkpoints_model(hf_models: HfModels, ranks: Ranks, tmp_path: Path):
    import yaml

    from megatron_groupdpo.config import ModelConfig

    options = ImportOptions(make_vocab_size_divisible_by=8)
    report = import_hf(hf_models("gpt2"), tmp_path / "checkpoint", options, ranks)
    section = yaml.safe_load((tmp_path / "checkpoint" / MODEL_YAML).read_text())["model"]
    policy = load_policy(tmp_path / "checkpoint", ParallelConfig(), PrecisionConfig(), ranks)
    assert ModelConfig(**section) == report.model
    assert policy.model.make_vocab_size_divisible_by == 8
    assert {s.global_shape[0] for s in policy_shards(policy) if s.allow_shape_mismatch} == {104}
