"""Trained ids are those of the text as it is read; what follows an answer; prompts to be continued; dialogues."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_makers import CHATML, load, make_chat_folder, text_of, tokens_of
from data_makers import CORPUS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.inspect.texts import TextCheck
from megatron_groupdpo.data.schemas import SchemaOptions, schema_named
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupSample

PROMPTS = ["Anna has 3 apples;", "How many?\n", "Yes: ", "naïve", "x = [1, 2]"]
RESPONSES = ["and buys", " and buys", "She has 4.", "\n12", "s", "é", "  two"]


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory) -> Tokenizer:
    """Llama-2's kind: a space before the first word of any text."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=names))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("metaspace")
    fast.save_pretrained(str(folder))
    return load(folder)


@pytest.fixture(scope="module")
def tokenizers(metaspace, tmp_path_factory, sentencepiece_model) -> dict[str, Tokenizer]:
    folder = make_chat_folder(tmp_path_factory.mktemp("bytes"), CHATML)
    plain = TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model))
    return {"metaspace": metaspace, "bytes": load(folder), "sentencepiece": load_tokenizer(plain)}


@pytest.mark.parametrize("kind", ["metaspace", "bytes", "sentencepiece"])
def test_the_ids_are_those_of_the_whole_text(tokenizers, kind):
    tokenizer, num_spanned = tokenizers[kind], 0
    for prompt in PROMPTS:
        for response in RESPONSES:
            record = {"prompt": prompt, "chosen": response, "rejected": "no"}
            group, counts = tokens_of(tokenizer, "pairs", record, add_bos="no")
            row = [*group.prompt_tokens.tolist(), *group.responses[0].tokens.tolist()]
            assert row[-1] == tokenizer.eos_id
            assert tokenizer.decode(row[:-1]) == prompt + response, "nothing is put between them"
            whole = tokenizer.encode(prompt + response)
            if whole[: len(group.prompt_tokens)] == group.prompt_tokens.tolist():
                assert row[:-1] == whole
            elif not counts[why.SPANNED]:
                rest = group.responses[0].tokens.tolist()[:-1]
                assert whole[-len(rest) :] == rest
            else:
                num_spanned += 1
    assert num_spanned < len(PROMPTS) * len(RESPONSES) / 2


def test_a_token_that_spans_the_prompts_end_is_counted(tokenizers):
    tokenizer = tokenizers["bytes"]
    whole, prompt = tokenizer.encode("Anna has 3 apples"), tokenizer.encode("Anna has 3 app")
    assert whole[: len(prompt)] != prompt, "the case must merge to be one"
    group, counts = tokens_of(tokenizer, "pairs", {"prompt": "Anna has 3 app", "chosen": "les", "rejected": " and"})
    assert group.responses[0].tokens.tolist() == [*tokenizer.encode("les"), tokenizer.eos_id]
    assert counts[why.SPANNED] == 1


def test_pieces_of_a_conversation_begin_with_no_space_of_their_own(metaspace):
    record = {"prompt": [{"role": "user", "content": "Anna has 3 app"}], "chosen": "les and", "rejected": "le"}
    prompt, trained = text_of(metaspace, "pairs", record)
    assert prompt + trained[0] == "Anna has 3 apples and</s>"


TURNS = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]


def test_the_templates_tail_of_a_turn_is_trained_on_request(tmp_path):
    tokenizer = load(make_chat_folder(tmp_path, CHATML))
    record = {"prompt": [{"role": "user", "content": "Q"}], "chosen": TURNS, "rejected": TURNS[:1]}
    assert text_of(tokenizer, "pairs", record)[1] == ["a<|im_end|>c<|im_end|>", "a<|im_end|>"]
    tails = text_of(tokenizer, "pairs", record, train_on_turn_tail=True)[1]
    assert tails == ["a<|im_end|>\nc<|im_end|>\n", "a<|im_end|>\n"]


def test_inspect_finds_no_fault_in_a_tail(tmp_path):
    import numpy as np

    tokenizer = load(make_chat_folder(tmp_path, CHATML))
    record = {"prompt": [{"role": "user", "content": "Q"}], "chosen": TURNS, "rejected": TURNS[:1]}
    group, _ = tokens_of(tokenizer, "pairs", record, train_on_turn_tail=True)
    sample = GroupSample(
        group_id=0,
        first_response_id=0,
        prompt_tokens=group.prompt_tokens,
        response_tokens=tuple(row.tokens for row in group.responses),
        response_masks=tuple(row.mask for row in group.responses),
        labels_K=np.array([1, -1]),
        values_K=np.array([np.nan, np.nan]),
    )
    faults = {"missing-end", "control-tokens-inside"}
    assert not faults & TextCheck(tokenizer, has_tails=True).sample(sample).findings.keys()
    assert faults <= TextCheck(tokenizer).sample(sample).findings.keys()


def test_a_prompt_that_ends_with_the_assistant_is_continued(tmp_path):
    tokenizer = load(make_chat_folder(tmp_path, CHATML))
    asked = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The answer"}]
    record = {"prompt": asked, "chosen": " is 5", "rejected": " is 6"}
    for options in ({}, {"response_text": "verbatim"}):
        prompt, trained = text_of(tokenizer, "pairs", record, **options)
        assert prompt == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nThe answer"
        assert trained == [" is 5<|im_end|>", " is 6<|im_end|>"]
    asked[1]["reasoning_content"] = "hm"
    with pytest.raises(DataError, match="the response continues, and it has more than content"):
        tokens_of(tokenizer, "pairs", record)


DIALOGUE = "\n\nHuman: Name a fruit.\n\nAssistant: Apple.\n\nHuman: Another.\n\nAssistant: "


def test_a_dialogue_in_a_text_becomes_turns_where_a_template_is_applied():
    answers = [{"answer": " Pear", "rank": 1}, {"answer": "Stone", "rank": 2}]
    schema, record = schema_named("nectar"), {"prompt": DIALOGUE, "answers": answers}
    group = schema.parse(record, "f:1", SchemaOptions(apply_chat_template=True))
    said = [("user", "Name a fruit."), ("assistant", "Apple."), ("user", "Another.")]
    assert [(turn.role, turn.content) for turn in group.prompt] == said
    assert [response.text for response in group.responses] == ["Pear", "Stone"]
    for apply in (False, None):
        assert schema.parse(record, "f:1", SchemaOptions(apply_chat_template=apply)).prompt == DIALOGUE
    pair = {side: DIALOGUE + side for side in ("chosen", "rejected")}
    group = schema_named("pairs").parse(pair, "f:1", SchemaOptions(apply_chat_template=True))
    assert [turn.content for turn in group.prompt] == [content for _, content in said]
    for odd in ("Human: a\n\nHuman: b\n\nAssistant:", "Human: a\n\nAssistant: b", "Humans: a\n\nAssistant:"):
        record = {"prompt": odd, "answers": answers}
        assert schema.parse(record, "f:1", SchemaOptions(apply_chat_template=True)).prompt == odd


def test_a_class_that_contradicts_its_own_file_is_refused(tmp_path: Path):
    import json

    folder = make_chat_folder(tmp_path, CHATML)
    load(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "BertTokenizer"}))
    with pytest.raises(DataError, match=r"names BertTokenizer.*and its tokenizer\.json as"):
        load(folder)


def test_chat_beside_plain_text_is_shown(write_lines, tmp_path):
    from megatron_groupdpo.data.inspect.inspection import inspect_store
    from megatron_groupdpo.data.preprocess.pipeline import preprocess
    from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
    from megatron_groupdpo.data.store.reader import TokenStore
    from megatron_groupdpo.data.text.tokenize import TokenizeOptions

    folder = make_chat_folder(tmp_path / "t", CHATML)
    chat = {"prompt": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder)),
        tokenize=TokenizeOptions(seq_length=64),
    )
    report = preprocess([str(write_lines([chat, {**chat, "prompt": "Q"}]))], tmp_path / "s", options)
    assert (report.counts[why.AS_CHAT], report.counts[why.AS_TEXT]) == (1, 1)
    codes = {finding.code for finding in inspect_store(TokenStore.open(tmp_path / "s"), None).findings}
    assert "mixed-forms" in codes
