"""A model, its data and its export have one tokenizer, whatever kind of file it comes from: checked at every door."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hf_examples import decoder
from sentencepiece import sentencepiece_model_pb2

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.convert import verify
from megatron_groupdpo.convert.exporting import ExportOptions, export_checkpoint
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.json_text import with_values
from megatron_groupdpo.convert.hf.model import open_hf_model
from megatron_groupdpo.convert.importing import ImportOptions, import_hf, prepare_import
from megatron_groupdpo.convert.start_weights import find_weights, load_any_policy
from megatron_groupdpo.data.text.identity import describe, differences
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import CheckpointError, UserError
from megatron_groupdpo.mcore.setup import Ranks

SP, HF = "SentencePieceTokenizer", "HuggingFaceTokenizer"
OwnCopy = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``trained(**options)``: a SentencePiece model of 420 pieces, bytes among them."""
    folder, made = tmp_path_factory.mktemp("pieces"), {}
    corpus = [f"Q: what is {a} plus {b}?\tA: the sum of these, then, is {a + b}" for a in range(30) for b in range(30)]

    def train(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = folder / f"{len(made)}.model"
            plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
            plain |= {"byte_fallback": True, "hard_vocab_limit": False}
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus), model_writer=made[key].open("wb"), vocab_size=420, minloglevel=2,
                **(plain | options),
            )  # fmt: skip
        return made[key]

    return train


def record(kind: str, path: Path | str, template: Path | None = None) -> dict[str, Any]:
    options = TokenizerOptions(kind=kind, model=str(path), chat_template=template and str(template))
    return json.loads(json.dumps(describe(load_tokenizer(options), options)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 420 tokens, without a tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model") / "llama"
    AutoModelForCausalLM.from_config(decoder("LlamaConfig", vocab_size=420)).save_pretrained(folder)
    return folder


def llama_folder(folder: Path, model: Path, **config: Any) -> Path:
    """A tokenizer as Llama 2's folders have it."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **names, **config}, indent=4)
    )
    return folder


def byte_folder(folder: Path) -> Path:
    """A slow tokenizer, in Python, of another vocabulary."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def without_identity(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "identity"}


def edited(model: Path, file: Path, change: Callable[[Any], None]) -> Path:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())
    return file


def test_files_of_one_tokenizer_are_one_whatever_their_kind(trained: Callable[..., Path], tmp_path: Path):
    model = trained()
    load_tokenizer(TokenizerOptions(kind=SP, model=str(model))).save(tmp_path / "exported")
    records = [
        record(SP, model),
        record(HF, tmp_path / "exported"),
        record(HF, llama_folder(tmp_path / "llama", model)),
        without_identity(record(SP, model)),
    ]
    assert len({one["digest"] for one in records}) == 3
    assert [differences(one, other) for one in records for other in records] == [[]] * 16
    slow = record(HF, byte_folder(tmp_path / "slow"))
    load_tokenizer(TokenizerOptions(kind=HF, model=str(tmp_path / "slow"))).save(tmp_path / "again")
    assert differences(slow, record(HF, tmp_path / "again")) == []


def test_what_tells_tokenizers_apart_is_named(trained: Callable[..., Path], tmp_path: Path):
    def ambiguous(proto: Any) -> None:  # "brown", among the texts that are compared
        proto.pieces.add(piece="ow", score=-0.5)
        proto.pieces.add(piece="wn", score=-0.6)

    base = edited(trained(), tmp_path / "base.model", ambiguous)
    ours = record(SP, base)

    def swap(proto: Any) -> None:
        proto.pieces[60].piece, proto.pieces[61].piece = proto.pieces[61].piece, proto.pieces[60].piece

    def other_scores(proto: Any) -> None:
        for piece in proto.pieces:
            piece.score = -piece.score

    def other_normaliser(proto: Any) -> None:
        proto.normalizer_spec.remove_extra_whitespaces = True

    found = [
        differences(ours, record(SP, edited(base, tmp_path / f"{change.__name__}.model", change)))
        for change in (swap, other_scores, other_normaliser)
    ]
    assert [len(one) for one in found] == [1, 1, 1]
    assert "other pieces" in found[0][0]
    assert "other ids for the same text" in found[1][0] == found[2][0]
    slow = record(HF, byte_folder(tmp_path / "slow"))
    assert differences(ours, slow)[0] == f"vocab_size {slow['vocab_size']} there, 422 here"
    other_end = record(HF, llama_folder(tmp_path / "end", base, eos_token="<unk>"))
    assert differences(ours, other_end) == ["eos_id 0 there, 2 here"]
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    chat = record(SP, base, tmp_path / "chat.jinja")
    assert differences(ours, chat) == []
    assert differences(ours, chat, with_template=True) == ["another chat template"]
    gone = without_identity(record(SP, trained())) | {"model": str(tmp_path / "gone"), "digest": "0" * 64}
    assert "digest" in differences(ours, gone)[0], "of two that cannot be compared"


def test_no_door_lets_a_foreign_tokenizer_through(
    trained: Callable[..., Path], llama: Path, ranks: Ranks, tmp_path: Path
):
    """Ids of another vocabulary would train other tokens than the data mean; an export would replace the model's."""
    folder, bare = llama_folder(Path(shutil.copytree(llama, tmp_path / "llama")), trained()), llama
    foreign_file = trained(model_type="unigram")
    foreign, same = record(SP, foreign_file), record(SP, trained())
    checkpoint = tmp_path / "checkpoint"
    import_hf(folder, checkpoint, ImportOptions(), ranks)
    layout = {"parallel": ParallelConfig(), "precision": PrecisionConfig(), "ranks": ranks}
    other_folder = Path(shutil.copytree(folder, tmp_path / "other"))
    llama_folder(other_folder, foreign_file)
    (tmp_path / "text").write_text("Q: 1 + 2 = ?\n")
    sequences = [np.arange(4)]

    doors: dict[str, Callable[[], Any]] = {
        "train from a folder": lambda: find_weights(str(folder)).tokenizer_with(
            foreign, find_weights(str(folder)).own_tokenizer()
        ),
        "train from a checkpoint": lambda: find_weights(str(checkpoint)).tokenizer_with(
            foreign, find_weights(str(checkpoint)).own_tokenizer()
        ),
        "score with a folder": lambda: load_any_policy(str(folder), **layout, tokenizers_of_data=[same, foreign]),
        "score with a checkpoint": lambda: load_any_policy(str(checkpoint), **layout, tokenizers_of_data=[foreign]),
        "import": lambda: prepare_import(folder, tmp_path / "x", ImportOptions(tokenizer=str(foreign_file))),
        "export": lambda: export_checkpoint(checkpoint, tmp_path / "y", ExportOptions(), tokenizer=str(foreign_file)),
        "verify a text": lambda: verify.text_sequences(
            tmp_path / "text", open_hf_model(folder), str(foreign_file), count=1, length=9
        ),
        "verify a checkpoint": lambda: verify.verify_on_layout(
            open_hf_model(other_folder), checkpoint, sequences, **layout
        ),
    }
    for door, enter in doors.items():
        with pytest.raises(UserError) as caught:
            enter()
        assert re.search(r"its tokenizer .* is not .*\(vocab_size", str(caught.value)), (door, caught.value)
    # the same tokenizer in other files passes, and a model without any takes what fits
    load_any_policy(str(checkpoint), **layout, tokenizers_of_data=[same])
    prepare_import(folder, tmp_path / "x", ImportOptions(tokenizer=str(trained())))
    assert export_checkpoint(checkpoint, tmp_path / "y", ExportOptions(), tokenizer=str(trained())).has_tokenizer
    assert find_weights(str(bare)).tokenizer_with(foreign, None) == foreign
    assert not find_weights(str(bare)).check_tokenizers([foreign])


def test_a_run_records_the_models_own_tokenizer_with_the_datas_template(
    trained: Callable[..., Path], llama: Path, tmp_path: Path
):
    folder = llama_folder(
        Path(shutil.copytree(llama, tmp_path / "llama")), trained(), chat_template="{{ old }}", extra="Łódź"
    )
    weights, template = find_weights(str(folder)), tmp_path / "chat.jinja"
    template.write_text('{{ bos_token }}new\n"quoted"')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for data, changed in ((record(SP, trained()), ()), (record(SP, trained(), template), ("tokenizer_config.json",))):
        chosen = weights.tokenizer_with(data, weights.own_tokenizer())
        assert (chosen["kind"], chosen["model"]) == (HF, str(folder))
        out = tmp_path / f"out{len(changed)}"
        tokenizers.load_checked(tokenizers.options_of(chosen), weights.hf.model).write(out)  # type: ignore[union-attr]
        assert {path.name for path in out.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
        for path in out.iterdir():
            assert (path.read_bytes() == before[path.name]) == (path.name not in changed)
    old, new = before["tokenizer_config.json"].decode(), (tmp_path / "out1" / "tokenizer_config.json").read_text()
    assert new == old.replace(json.dumps("{{ old }}"), json.dumps(template.read_text()))
    assert load_tokenizer(TokenizerOptions(kind=HF, model=str(out))).chat_template == template.read_text()


def test_a_tokenizer_that_cannot_be_loaded_is_not_passed_over(own_copy: OwnCopy, trained: Callable[..., Path]):
    folder = own_copy("llama-tied")
    (folder / "tokenizer.json").write_text("{")
    weights = find_weights(str(folder))
    with pytest.raises(CheckpointError, match="cannot be loaded and so not be compared"):
        weights.check_tokenizers([record(SP, trained())])


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ('{"b": 1, "a": {"c": [1, 2]}}', '{"b": 1, "a": [3], "d": "é"}'),
        ('{\n  "b": 1,\n  "a": {}\n}\n', '{\n  "b": 1,\n  "a": [\n    3\n  ],\n  "d": "é"\n}\n'),
        ('{ "a" :\t"}{," ,"b":1.50 }', '{ "a" :\t[3] ,"b":1.50, "d": "é" }'),
        ("{}", '{"a": [3],"d": "é"}'),
    ],
)
def test_one_value_of_a_json_file_is_changed_and_nothing_else(text: str, changed: str):
    assert with_values(text, {}) == text
    assert with_values(text, {"a": [3], "d": "é"}) == changed
