"""What a record says is in the tokens: whole through the template, whole through the tokenizer, or it is no data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from chat_makers import CHATML, CUTTING, DATED, load, make_chat_folder, text_of, tokens_of
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.preprocess.prepare import GroupPreparer, PreprocessOptions
from megatron_groupdpo.data.schemas import schema_named
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import DataError

USER = {"role": "user", "content": "2 + 3?"}
THOUGHTS = {"prompt": [USER], "chosen": "<think>two and three</think>5", "rejected": "<think>guess</think>5"}


@pytest.fixture(scope="module")
def cutting(tmp_path_factory) -> Tokenizer:
    return load(make_chat_folder(tmp_path_factory.mktemp("cutting"), CUTTING))


@pytest.fixture(scope="module")
def dated(tmp_path_factory) -> Tokenizer:
    return load(make_chat_folder(tmp_path_factory.mktemp("dated"), DATED))


@pytest.fixture(scope="module")
def few_characters(tmp_path_factory) -> Tokenizer:
    """Latin letters and digits, in lower case: no unknown token, no bytes."""
    vocab = {c: i for i, c in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,?+=<>_|/\n"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    folder = tmp_path_factory.mktemp("few")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"  # noqa: E501
    fast.save_pretrained(str(folder))
    return load(folder)


def prepare(tokenizer: Tokenizer, record: dict[str, Any], schema: str = "pairs", **options: Any):
    counts: Counter = Counter()
    made = PreprocessOptions(
        tokenizer=TokenizerOptions(kind="HuggingFaceTokenizer", model=""),
        tokenize=TokenizeOptions(**{"seq_length": 512, **options}),
        on_bad_record="drop",
    )
    group = GroupPreparer(made, tokenizer).prepare(record, "f.jsonl:7", schema_named(schema), counts)
    return group, +counts


def test_a_response_that_the_template_cuts_is_no_data(cutting):
    with pytest.raises(DataError, match=r"^f\.jsonl:7: the chat template leaves out .*content.*response 0.*verbatim"):
        tokens_of(cutting, "pairs", THOUGHTS)
    group, counts = prepare(cutting, THOUGHTS)
    assert group is None
    assert counts[why.LOST_BY_TEMPLATE] == 1


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_a_response_can_be_written_as_it_is(tmp_path, opening):
    template = CUTTING.replace(
        "{% if add_generation_prompt %}<|im_end|>", "{% if add_generation_prompt %}<|im_end|>" + opening
    )
    tokenizer = load(make_chat_folder(tmp_path, template))
    prompt, trained = text_of(tokenizer, "pairs", THOUGHTS, response_text="verbatim")
    assert prompt == "<|im_start|>2 + 3?<|im_end|>" + opening
    cut = "<think>" if opening else ""
    assert trained == [f"{THOUGHTS[side].removeprefix(cut)}<|im_end|>" for side in ("chosen", "rejected")]


def test_several_turns_can_be_written_as_they_are(tmp_path):
    tokenizer = load(make_chat_folder(tmp_path, CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")))
    turns = [
        {"role": "assistant", "content": "<think>x</think>1"},
        USER,
        {"role": "assistant", "content": "<think>y</think>2"},
    ]
    _, trained = text_of(
        tokenizer, "pairs", {"prompt": [USER], "chosen": turns, "rejected": turns[:1]}, response_text="verbatim"
    )
    assert trained[0] == "<think>x</think>1<|im_end|><think>y</think>2<|im_end|>"


def test_a_turn_of_the_prompt_that_the_template_drops_is_no_data(cutting):
    record = {**THOUGHTS, "prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": "5", "rejected": "6"}
    with pytest.raises(DataError, match=r"leaves out some of the content of a turn of 'system' in the prompt"):
        tokens_of(cutting, "pairs", record)


def test_reasoning_of_earlier_turns_may_go_and_is_counted(cutting):
    earlier = [USER, {"role": "assistant", "content": "<think>hm</think>5"}, USER]
    group, counts = tokens_of(cutting, "pairs", {"prompt": earlier, "chosen": "5", "rejected": "6"})
    assert len(group.responses) == 2
    assert +counts == {why.REASONING_CUT: 1}


def test_trimmed_white_space_is_counted(dated):
    record = {"prompt": [{"role": "user", "content": " Q"}], "chosen": "six\n", "rejected": "seven"}
    _, counts = tokens_of(dated, "pairs", record)
    assert +counts == {why.PROMPT_TRIMMED: 1, why.RESPONSE_TRIMMED: 1}


@pytest.mark.parametrize("apply_chat_template", [False, True])
@pytest.mark.parametrize("place", ["prompt", "chosen"])
def test_characters_without_tokens_are_no_data(few_characters, place, apply_chat_template):
    record = {"prompt": "what?", "chosen": "five", "rejected": "six", place: "привет"}
    with pytest.raises(DataError, match=r"^f\.jsonl:7: the tokenizer has no tokens for some of .*'привет'"):
        tokens_of(few_characters, "pairs", record, apply_chat_template=apply_chat_template)
    for part in ("a й b", "👍"):
        group, counts = prepare(few_characters, {**record, place: part}, apply_chat_template=apply_chat_template)
        assert group is None
        assert counts[why.LOST_BY_TOKENIZER] == 1


def test_an_unknown_token_is_a_loss(train_sentencepiece):
    model = str(train_sentencepiece(byte_fallback=False))
    tokenizer = load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=model))
    assert not tokenizer.keeps_all_text
    with pytest.raises(DataError, match="has no tokens for some of response 0"):
        tokens_of(tokenizer, "pairs", {"prompt": "Anna", "chosen": "日本", "rejected": "apples"})
    tokens_of(tokenizer, "pairs", {"prompt": "Anna has 3", "chosen": "  two\n", "rejected": "apples"})


def test_what_the_normalizer_changes_is_counted(few_characters, train_sentencepiece):
    _, counts = tokens_of(few_characters, "pairs", {"prompt": "What?", "chosen": "Five", "rejected": "six"})
    assert +counts == {why.PROMPT_NORMALIZED: 1, why.RESPONSE_NORMALIZED: 1}
    model = str(train_sentencepiece(normalization_rule_name="nmt_nfkc"))
    tokenizer = load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=model))
    _, counts = tokens_of(tokenizer, "pairs", {"prompt": "Anna", "chosen": "ﬁve", "rejected": "six"})
    assert +counts == {why.RESPONSE_NORMALIZED: 1}


def test_responses_with_the_same_tokens_do_not_stand_against_each_other(dated, few_characters):
    group, counts = prepare(dated, {"prompt": [USER], "chosen": "six", "rejected": "six "})
    assert group is None
    assert counts[why.SAME_TOKENS_AS_OTHER_SIDE] == 2
    rows = [{"text": text, "label": label} for text, label in (("Six", 1), ("six", 1), ("seven", -1))]
    group, counts = prepare(few_characters, {"prompt": "q", "responses": rows}, "canonical")
    assert len(group.response_tokens) == 2
    assert counts[why.SAME_TOKENS] == 1
    cut = {"prompt": "q", "chosen": "the answer is five", "rejected": "the answer is nine"}
    group, counts = prepare(few_characters, cut, seq_length=10, length_policy="truncate-response")
    assert group is None
    assert counts[why.SAME_TOKENS_AS_OTHER_SIDE] == 2
    group, _ = prepare(few_characters, cut)
    assert not np.array_equal(*group.response_tokens)
