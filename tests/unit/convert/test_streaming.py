"""What a conversion holds at one time, counted in bytes; and what it writes byte by byte."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import CONFIG_NAMES, tensors_of
from hf_examples import decoder

from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.hf.shards import assign_files
from megatron_groupdpo.convert.importing import ImportOptions, import_hf
from megatron_groupdpo.mcore.checkpoint.tensors import CheckpointTensors
from megatron_groupdpo.mcore.setup import Ranks

MIB = 2**20


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_windows_read_are_the_windows_of_the_whole_tensor(name: str, hf_models: Callable[..., Path]):
    source = open_hf_model(hf_models(name))
    read = 0
    for key, pair in source.plan.items():
        if not pair.moves_rows:
            continue
        whole = source.read(key)
        rows = pair.shape[0]
        for first, last in ((0, rows), (rows // 3, rows - 1), (rows - 5, rows + 7), (rows + 3, rows + 9)):
            window = (slice(first, last), *(slice(1, size - 1) for size in pair.shape[1:]))
            wanted = whole[window]
            out = torch.full_like(wanted, 7)
            source.read_into(out, key, window)
            assert torch.equal(out, wanted), (key, window)
            read += wanted.numel()
    assert read or name.startswith("gpt2")


MEASURE = """
import sys
from pathlib import Path
def peak():  # since the last reset
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
def now():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
def reset():
    Path("/proc/self/clear_refs").write_text("5")
source, out, what = sys.argv[1:]
if what == "read":
    from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
    from megatron_groupdpo.convert.hf.model import open_hf_model
    from megatron_groupdpo.convert.weights.loading import fill
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize
    ranks = initialize(ParallelConfig(device="cpu"), seed=0)
    model = open_hf_model(Path(source)).model
    before = now(); reset()
    policy = build_policy(model, ParallelConfig(), PrecisionConfig(), ranks, seed=None, training=False)
    fill(policy, open_hf_model(Path(source)))
else:
    from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint
    import megatron.core.dist_checkpointing, transformers, safetensors.torch
    from transformers import Qwen2Config
    before = now(); reset()
    export_checkpoint(Path(source), Path(out), ExportOptions(max_shard_size=8 * 2**20))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB in files of at most 8 MiB, the largest tensor 4 MiB."""
    from transformers import AutoModelForCausalLM

    config = decoder(
        "Qwen2Config", vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("large") / "hf"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="8MB")
    assert len(list(folder.glob("*.safetensors"))) > 8
    return folder


def held(repository: Path, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], cwd=repository, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


SLACK = 24 * MIB
"""For what is no weights: modules, allocator, libraries loaded late."""


@pytest.mark.costly
def test_host_memory_is_the_partition_and_one_file(repository: Path, large: Path, ranks: Ranks, tmp_path: Path):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 90 * MIB
    read = held(repository, str(large), "-", "read")
    assert size * 0.9 < read < size + 8 * MIB + SLACK, f"{read / MIB:.1f} MiB"
    import_hf(large, tmp_path / "checkpoint", ImportOptions(), ranks)
    written = held(repository, str(tmp_path / "checkpoint"), str(tmp_path / "out"), "write")
    assert written < 8 * MIB + SLACK, f"{written / MIB:.1f} MiB of a model of {size / MIB:.1f}"
    before, after = tensors_of(large), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    print(f"\nmodel {size / MIB:.1f} MiB; import holds {read / MIB:.1f}, export {written / MIB:.1f}")


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own():
    files = assign_files({"a": 4, "b": 6, "c": 11, "d": 10, "e": 1}, 10)
    assert list(files.values()) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 1, 2, 3, 4)]
    assert set(assign_files({"a": 4, "b": 6}, 10).values()) == {"model.safetensors"}


def test_files_that_did_not_change_come_back_byte_for_byte(
    own_copy: Callable[[str], Path], ranks: Ranks, tmp_path: Path, sentencepiece_model: Path
):
    from megatron_groupdpo.data.text.loading import load_tokenizer
    from megatron_groupdpo.data.text.tokenizer import TokenizerOptions

    folder = own_copy("qwen2-tied")
    load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model))).save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}  \n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2],\n\n"temperature": 0.6}')
    import_hf(folder, tmp_path / "checkpoint", ImportOptions(), ranks)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert "tokenizer.json" in names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bf16", ExportOptions(dtype="bf16"))
    changed = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert changed.pop("dtype") == "bfloat16"
    assert changed == {name: value for name, value in config.items() if name != "dtype"}


def test_extra_state_of_transformer_engine_is_passed_over(hf_models: Callable[..., Path], ranks: Ranks, tmp_path: Path):
    """A checkpoint of an FP8 run: names of fused layers, scales as objects beside the weights, weights in bf16."""
    folder = hf_models("llama-untied", torch.bfloat16)
    import_hf(folder, tmp_path / "checkpoint", ImportOptions(), ranks)
    file = tmp_path / "checkpoint" / "iter_0000000" / ".metadata"
    metadata: Any = pickle.loads(file.read_bytes())
    states = [name for name in metadata.state_dict_metadata if "_extra_state" in name]
    assert states, "Megatron's layers write some even without Transformer Engine"
    fused = {
        "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    }
    for plain, name in fused.items():
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop(plain)
        for index in [index for index in metadata.storage_data if index.fqn == plain]:
            stored = metadata.storage_data.pop(index)
            metadata.storage_data[type(index)(name, index.offset, index.index)] = stored
    extra = metadata.state_dict_metadata[states[0]]
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.amax._extra_state/shard_0_1"] = extra
    file.write_bytes(pickle.dumps(metadata))
    assert not [name for name in CheckpointTensors(file.parent).shapes if "extra" in name]
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(before[name], after[name]) for name in before)


def test_a_damaged_checkpoint_is_not_exported(hf_models: Callable[..., Path], ranks: Ranks, tmp_path: Path):
    from megatron_groupdpo.errors import CheckpointError

    import_hf(hf_models("llama-tied"), tmp_path / "checkpoint", ImportOptions(), ranks)
    folder = tmp_path / "checkpoint" / "iter_0000000"
    metadata: Any = pickle.loads((folder / ".metadata").read_bytes())
    gone = metadata.state_dict_metadata.pop("decoder.layers.mlp.linear_fc2.weight")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'decoder.layers.mlp.linear_fc2.weight'"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"] = gone
    metadata.state_dict_metadata["decoder.layers.mlp.router.weight"] = gone
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'decoder.layers.mlp.router.weight'"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    metadata.state_dict_metadata.pop("decoder.layers.mlp.router.weight")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"iter_0000000.* cannot be read") as caught:
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_an_import_onto_a_full_disk_leaves_nothing(hf_models: Callable[..., Path], ranks: Ranks, tmp_path: Path):
    from megatron_groupdpo.errors import CheckpointError

    source = hf_models("llama-tied")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            import_hf(source, tmp_path / "checkpoint", ImportOptions(), ranks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
