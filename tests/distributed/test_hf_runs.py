"""Training that starts from a Hugging Face folder and ends with one; conversion on several ranks."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_examples import decoder
from rank_pool import RankPool
from safetensors.torch import load_file
from tiny_run import TinyData, output_on_rank, refusal_on_rank

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def start(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model with the tiny run's tokenizer size, in two files, and no tokenizer."""
    from transformers import AutoModelForCausalLM

    from megatron_groupdpo.data.store.reader import TokenStore

    vocab = int(TokenStore.open(tiny_data.store).meta["tokenizer"]["vocab_size"])
    config = decoder(
        "Qwen2Config", vocab_size=vocab, num_hidden_layers=2, tie_word_embeddings=True, max_position_embeddings=128
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("start") / "hf"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def flags(tiny_data: TinyData, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a short run whose file has no model section."""

    def make(*more: str, model: Mapping[str, Any] | None = None) -> list[str]:
        import tiny_run
        import yaml

        path = tiny_run.write_config(tmp_path / "run.yaml", tiny_data.store, tiny_data.reference)
        config = yaml.safe_load(path.read_text())
        config["model"] = dict(model or {})
        config["training"] |= {"train_iters": 2}
        config["optimizer"] |= {"lr_warmup_iters": 0}
        path.write_text(yaml.safe_dump({name: section for name, section in config.items() if section}))
        return ["--config", str(path), *more]

    return make


@pytest.mark.acts("CheckpointConfig.export_hf", "CheckpointConfig.export_hf_interval")
@pytest.mark.parametrize("layout", [TP2, PP2], ids=["TP2", "PP2"])
def test_a_run_starts_from_a_hugging_face_folder_and_ends_with_one(
    pool: RankPool, flags: Callable[..., list[str]], start: Path, tmp_path: Path, layout: Sequence[str]
):
    """The exported folder is the checkpoint's own export, bit for bit, and transformers reads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint

    out, save = tmp_path / "out", tmp_path / "save"
    argv = flags("--load", str(start), "--save", str(save), "--export-hf", str(out), *layout)
    pool.run(2, output_on_rank, [*argv, "--export-hf-interval", "1"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "out", "out-iter_0000001", "out-iter_0000002", "save",
    ]  # fmt: skip
    export_checkpoint(save, tmp_path / "again", ExportOptions())
    before, first, end = tensors_of(start), tensors_of(tmp_path / "out-iter_0000001"), tensors_of(out)
    again, second = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out-iter_0000002")
    assert end.keys() == before.keys() == again.keys()
    assert all(torch.equal(end[name], again[name]) and torch.equal(end[name], second[name]) for name in end)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first[embedding], before[embedding])
    assert not torch.equal(end[embedding], first[embedding])
    assert (end[embedding] - before[embedding]).abs().max() < 0.1, "not the weights that the run began with"
    assert (out / "config.json").read_bytes() == (start / "config.json").read_bytes()
    ids = AutoTokenizer.from_pretrained(out)("1 + 1")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(out)(torch.tensor([ids])).logits.isfinite().all()


def test_a_run_exports_the_models_own_tokenizer_and_refuses_a_foreign_one(
    pool: RankPool, flags: Callable[..., list[str]], start: Path, tiny_data: TinyData, tmp_path: Path
):
    """The store was made with the SentencePiece file; the model has it in files of another kind."""
    import yaml
    from transformers import AutoModelForCausalLM

    from megatron_groupdpo.data.text.loading import load_tokenizer
    from megatron_groupdpo.data.text.tokenizer import TokenizerOptions

    vocab = json.loads((start / "config.json").read_text())["vocab_size"]
    own = tmp_path / "own"
    config = decoder("LlamaConfig", vocab_size=vocab, max_position_embeddings=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(own)
    load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=str(tiny_data.tokenizer))).save(own)
    file = own / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"note": "the model's"}, indent=1))
    (own / "generation_config.json").write_text('{"eos_token_id": 7}')
    argv = flags("--load", str(own), "--save", str(tmp_path / "save"), "--export-hf", str(tmp_path / "out"))
    (output,) = pool.run(1, output_on_rank, argv)
    assert "eos_token_id [7] and the trained responses end with [2]" in output
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": [7, 2]}'
    assert "has none; the data's" not in output
    assert "misreads" not in output
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (own / name).read_bytes(), name
    file.write_text(file.read_text().replace('"eos_token": "</s>"', '"eos_token": "<unk>"'))
    refused = [pool.run(1, refusal_on_rank, flags("--load", str(own)))[0]]
    resident = flags("--load", str(start), "--pretrained-checkpoint", str(own), "--reference", "resident")
    config = yaml.safe_load(Path(resident[1]).read_text())
    del config["objective"]["reference_logprobs"]
    Path(resident[1]).write_text(yaml.safe_dump(config))
    refused.append(pool.run(1, refusal_on_rank, resident)[0])
    for kind, message in refused:
        assert kind == "CheckpointError", message
        assert "(eos_id 0 there, 2 here)" in message
    output = pool.run(1, output_on_rank, flags("--load", str(start)))[0]
    assert f"tokenizer   {start} has none; the data's, {tiny_data.tokenizer}, is taken to be its own" in output


def test_a_run_resumes_from_its_own_checkpoint_not_from_the_folder_again(
    pool: RankPool, flags: Callable[..., list[str]], start: Path, tmp_path: Path
):
    argv = flags("--load", str(start), "--save", str(tmp_path / "save"), *TP2)
    output = "".join(pool.run(2, output_on_rank, [*argv, "--train-iters", "1", "--lr-decay-iters", "2"]))
    assert f"weights     {start}" in output
    output = "".join(pool.run(2, output_on_rank, [*argv, "--export-hf", str(tmp_path / "out")]))
    assert f"weights     {tmp_path / 'save' / 'iter_0000001'}" in output
    assert "iterations 1 to 2" in output
    assert (tmp_path / "out" / "config.json").read_bytes() == (start / "config.json").read_bytes()


def test_loading_equals_importing_first(pool: RankPool, flags: Callable[..., list[str]], start: Path, tmp_path: Path):
    """On the fly on two stages, and through a checkpoint that two tensor-parallel ranks wrote: the same run."""
    (report, _) = pool.run(2, import_on_rank, start, tmp_path / "checkpoint", {"tensor_model_parallel_size": 2})
    assert report == ["latest_checkpointed_iteration.txt", "iter_0000000", "model.yaml"]
    import yaml
    from tiny_run import train_on_rank

    model = yaml.safe_load((tmp_path / "checkpoint" / "model.yaml").read_text())["model"]
    given = flags("--pretrained-checkpoint", str(tmp_path / "checkpoint"), *PP2, model=model)
    through = pool.run(2, train_on_rank, given)
    assert pool.run(2, train_on_rank, flags("--pretrained-checkpoint", str(start), *PP2)) == through
    assert pool.run(2, train_on_rank, flags("--load", str(start), *PP2, model={"hidden_size": 48})) == through


def import_on_rank(source: Path, target: Path, layout: Mapping[str, Any]) -> list[str]:
    from megatron_groupdpo.config import ParallelConfig
    from megatron_groupdpo.convert.importing import ImportOptions, import_hf
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    parallel = ParallelConfig(device="cpu", **layout)
    try:
        import_hf(source, target, ImportOptions(), initialize(parallel, seed=0), parallel=parallel)
        return sorted(
            (path.name for path in target.iterdir()),
            key=lambda name: (name != "latest_checkpointed_iteration.txt", name),
        )
    finally:
        shut_down()


def failing_import_on_rank(source: Path, target: Path, limit: int) -> tuple[str, str]:
    """With files limited to so many bytes on rank 1 alone, as on a full disk."""
    from megatron_groupdpo.errors import UserError

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        import_on_rank(source, target, {"tensor_model_parallel_size": 2})
    except UserError as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("the import went through")


def test_a_disk_that_fails_one_rank_stops_all_and_leaves_nothing(pool: RankPool, start: Path, tmp_path: Path):
    for kind, message in pool.run(2, failing_import_on_rank, start, tmp_path / "made" / "it", 20_000):
        assert kind == "CheckpointError", message
        assert "cannot be written" in message, message
    assert list((tmp_path / "made").iterdir()) == []


def test_a_file_that_one_rank_cannot_read_stops_all(pool: RankPool, start: Path, tmp_path: Path):
    """Cut after its header was checked: only the rank that needs the last rows finds it."""
    answers = pool.run(2, cut_import_on_rank, start, tmp_path / "out")
    assert all(kind == "CheckpointError" and "cannot be read" in message for kind, message in answers), answers
    assert not (tmp_path / "out").exists()


def cut_import_on_rank(source: Path, target: Path) -> tuple[str, str]:
    from megatron_groupdpo.convert.hf.files import HfWeights
    from megatron_groupdpo.errors import CheckpointError

    read, calls = HfWeights.read, [0]

    def failing(self: HfWeights, name: str, window: tuple[slice, ...] = ()) -> torch.Tensor:
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] > 3:
            raise CheckpointError(f"{name} cannot be read")
        return read(self, name, window)

    HfWeights.read = failing  # type: ignore[method-assign]
    try:
        import_on_rank(source, target, {"tensor_model_parallel_size": 2})
    except CheckpointError as error:
        return type(error).__name__, str(error)
    finally:
        HfWeights.read = read  # type: ignore[method-assign]
    raise AssertionError("the import went through")


def test_a_model_section_that_contradicts_the_folder_is_refused_field_by_field(
    pool: RankPool, flags: Callable[..., list[str]], start: Path
):
    model = {"hidden_size": 64, "norm_epsilon": 1e-5, "make_vocab_size_divisible_by": 8}
    (kind, message), *_ = pool.run(1, refusal_on_rank, flags("--load", str(start), model=model))
    assert kind == "ConfigError"
    assert "hidden_size: 48 there, 64 in the model section; norm_epsilon: 0.001 there, 1e-05" in message
    assert "divisible" not in message


def test_an_export_that_fails_leaves_the_checkpoint_and_the_exit_says_so(
    pool: RankPool, flags: Callable[..., list[str]], start: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    argv = flags("--load", str(start), "--save", str(tmp_path / "save"), "--export-hf", str(out), *TP2)
    for kind, message in pool.run(2, refusal_on_rank, [*argv, "--export-hf-interval", "1"]):
        assert kind == "CheckpointError", message
        assert "checkpoints are whole, but 3 export(s) failed" in message
        assert str(out) in message
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "2"
    (tmp_path / "file").unlink()
    pool.run(2, output_on_rank, argv)
    assert (out / "config.json").is_file(), "the finished run writes what it could not"


def test_a_folder_that_is_not_the_runs_is_not_replaced(
    pool: RankPool, flags: Callable[..., list[str]], start: Path, tmp_path: Path
):
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    for folder, words in ((start, "must not be the input"), (tmp_path / "mine", "exists and is not empty")):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        argv = flags("--pretrained-checkpoint", str(start), "--export-hf", f"{folder}/../{folder.name}", *TP2)
        for kind, message in pool.run(2, refusal_on_rank, argv):
            assert (kind, words in message) == ("CheckpointError", True), message
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before
