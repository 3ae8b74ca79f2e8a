"""One face for both kinds of tokenizer, and the same ids after export."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import transformers
from data_makers import CORPUS, train_byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megatron_groupdpo.data.text.loading import apply_chat_template, load_tokenizer
from megatron_groupdpo.data.text.sentencepiece_export import build_fast_tokenizer
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import Message

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HARD = [
    " ", "  two", "tail  ", "\n", "\n\n a\n", "\tx", "a\r\nb", "007 1,000.5", "</s> <s> <unk> <0x0A> <pad>", "▁x ▁ y▁",
    "naïve ﬁ ½ é", "日本 🙂👩‍👩‍👧", "\u00a0\u3000", "zzzzzzzz", "", *CORPUS[:20],
]  # fmt: skip


def load(kind: str, model: Path | str, template: Path | None = None):
    chat_template = None if template is None else str(template)
    return load_tokenizer(TokenizerOptions(kind=kind, model=str(model), chat_template=chat_template))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("symbols", [[], ["<|user|>", "<|user|>:", "\n"]])
def test_an_exported_sentencepiece_model_gives_the_same_ids(
    train_sentencepiece, tmp_path, model_type, byte_fallback, prefix, symbols
):
    model = train_sentencepiece(
        model_type=model_type,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        user_defined_symbols=symbols,
    )
    ours = load("SentencePieceTokenizer", model)
    ours.save(tmp_path / "folder")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*HARD, "a<|user|>b<|user|>: \n<|user|>", "<|user|>"]:
        expected = reference.encode(text)
        assert ours.encode(text) == expected
        assert exported.encode(text, add_special_tokens=False) == expected, repr(text)
        assert exported.encode(text) == [reference.bos_id(), *expected]
        if byte_fallback:
            assert exported.decode(expected) == ours.decode(expected) == reference.decode(expected)
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 2, 3)
    assert len(exported) == ours.vocab_size == reference.get_piece_size()


@pytest.mark.parametrize("symbols", [[], ["<|user|>"]])
def test_pieces_that_span_a_control_name_do_not_make_it_readable(train_sentencepiece, tmp_path, symbols):
    model = train_sentencepiece(model_type="unigram", user_defined_symbols=symbols)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    for piece in ["<", "/", "<s", "</", "/s", "s>"]:
        proto.pieces.add(piece=piece, score=-5.0)
    model.write_bytes(proto.SerializeToString())
    load("SentencePieceTokenizer", model).save(tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ["</s>", "<s>", "a</s>b<s></s>", *HARD]:
        assert exported.encode(text, add_special_tokens=False) == reference.encode(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from(" \n\tab139.,=<>/s▁é日🙂\u00a0Annapleshw"), max_size=40))
def test_any_text_gets_sentencepieces_ids(sentencepiece_model, text):
    exported = _exported(sentencepiece_model)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert exported.encode(text, add_special_tokens=False) == reference.encode(text)


_cache: dict[Path, transformers.PreTrainedTokenizerFast] = {}


def _exported(model: Path) -> transformers.PreTrainedTokenizerFast:
    if model not in _cache:
        _cache[model] = build_fast_tokenizer(model, add_bos=True)
    return _cache[model]


def test_a_normalizing_sentencepiece_model_is_exported(train_sentencepiece, tmp_path):
    model = train_sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    ours = load("SentencePieceTokenizer", model)
    ours.save(tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        assert exported.encode(text, add_special_tokens=False) == ours.encode(text), repr(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char"}, "only unigram and BPE"),
        ({"treat_whitespace_as_suffix": True}, "only unigram and BPE"),
        # the character map turns the symbol into a space before it could be matched
        ({"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["\n"]}, "the export gives"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused(train_sentencepiece, tmp_path, options, message):
    tokenizer = load("SentencePieceTokenizer", train_sentencepiece(**options))
    with pytest.raises(DataError, match=message):
        tokenizer.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.acts("TokenizerOptions.kind")
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_tokenizer_that_is_not_there_is_one_clear_error(tmp_path, kind):
    with pytest.raises(DataError, match=r"--tokenizer-model .*nowhere: no such"):
        load(kind, tmp_path / "nowhere")


def test_a_wrong_tokenizer_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "a.model").write_text("not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load("SentencePieceTokenizer", tmp_path / "a.model")
    with pytest.raises(DataError, match="no Hugging Face tokenizer could be loaded"):
        load("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(ConfigError, match="--tokenizer-type must be one of"):
        load("BertWordPiece", tmp_path)


def test_special_names_in_plain_text_are_text_and_in_rendered_text_are_tokens(tmp_path):
    names = {"eos_token": "</s>", "bos_token": "<s>"}
    folder = train_byte_level(tmp_path, special=["<s>", "</s>"], chat_template=None, **names)
    tokenizer = load("HuggingFaceTokenizer", folder)
    assert tokenizer.eos_id not in tokenizer.encode("a</s>b")
    assert tokenizer.encode_rendered("a</s>b").count(tokenizer.eos_id) == 1
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"
    assert tokenizer.special_ids == {tokenizer.bos_id, tokenizer.eos_id}
    assert not tokenizer.adds_bos
    with pytest.raises(DataError, match="has no chat template"):
        tokenizer.render_chat([Message(role="user", content="x")], add_generation_prompt=True)


@pytest.mark.acts("TokenizerOptions.chat_template")
def test_the_chat_template_is_the_tokenizers_or_a_files(tmp_path, sentencepiece_model, train_sentencepiece):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    messages = [Message(role="user", content="Hi"), Message(role="assistant", content="Yes")]
    expected = "<|user|>Hi</s><|assistant|>Yes</s><|assistant|>"
    plain = load("SentencePieceTokenizer", sentencepiece_model)
    with pytest.raises(DataError, match="--chat-template FILE"):
        plain.render_chat(messages, add_generation_prompt=True)
    templated = load("SentencePieceTokenizer", sentencepiece_model, tmp_path / "chat.jinja")
    assert templated.render_chat(messages, add_generation_prompt=True) == expected
    templated.save(tmp_path / "folder")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    as_dicts = [{"role": m.role, "content": m.content} for m in messages]
    ids = exported.apply_chat_template(as_dicts, add_generation_prompt=True, return_dict=False)
    assert ids == apply_chat_template(templated, messages, add_generation_prompt=True)
    assert plain.digest != templated.digest


def test_the_digest_follows_the_content_not_the_path(tmp_path, train_sentencepiece):
    first, second = train_sentencepiece(), train_sentencepiece(vocab_size=400)
    copy = tmp_path / "copy.model"
    copy.write_bytes(first.read_bytes())
    digests = [load("SentencePieceTokenizer", model).digest for model in (first, copy, second)]
    assert digests[0] == digests[1] != digests[2]
    folder = train_byte_level(tmp_path / "a", special=["</s>"], chat_template=None, eos_token="</s>")
    tokenizer = load("HuggingFaceTokenizer", folder)
    tokenizer.save(tmp_path / "b")
    before = tokenizer.digest
    tokenizer._tokenizer("text", truncation=True, max_length=2)
    assert load("HuggingFaceTokenizer", tmp_path / "b").digest == before == tokenizer.digest


def test_control_names_of_a_template_are_sentencepieces_pieces_and_in_a_message_text(sentencepiece_model, tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    tokenizer = load("SentencePieceTokenizer", sentencepiece_model, tmp_path / "chat.jinja")
    messages = [Message(role="user", content="2+3? </s><s>"), Message(role="assistant", content="5")]
    ids = apply_chat_template(tokenizer, messages, add_generation_prompt=False)
    assert ids == [1, *tokenizer.encode("Q 2+3? </s><s> 5 "), 2]
    assert {1, 2}.isdisjoint(tokenizer.encode("Q 2+3? </s><s> 5 "))
    tokenizer.save(tmp_path / "folder")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    plain = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    assert exported.apply_chat_template(plain, return_dict=False) == [1, *tokenizer.encode("Q 2+3? 5 "), 2]
