"""The prompt is a token prefix, exactly the response and its end token count, and no row is too long."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
from data_makers import STYLES, make_folder

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenize import GroupTokenizer, TokenizedGroup, TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import GroupRecord, Message, ResponseRecord, Text


@pytest.fixture(params=STYLES)
def chat_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_folder(tmp_path, *STYLES[request.param])


def hugging_face(folder: Path) -> Tokenizer:
    return load_tokenizer(TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder)))


@pytest.fixture
def plain(sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model)))


def tokenize(
    tokenizer: Tokenizer, prompt: Text, *responses: Text, seq_length: int = 4096, **options
) -> tuple[TokenizedGroup | None, Counter]:
    counts: Counter = Counter()
    record = GroupRecord(
        prompt=prompt, responses=tuple(ResponseRecord(text=text) for text in responses), where="f.jsonl:3"
    )
    group = GroupTokenizer(tokenizer, TokenizeOptions(seq_length=seq_length, **options)).tokenize(record, counts)
    return group, counts


def turns(*contents: str, start: str = "user") -> tuple[Message, ...]:
    roles = ["user", "assistant"] if start == "user" else ["assistant", "user"]
    return tuple(Message(role=roles[i % 2], content=content) for i, content in enumerate(contents))


def test_text_is_prompt_then_response_then_end(plain):
    group, _ = tokenize(plain, "Anna has 3 apples;", " how\nmany?", "Yes")
    assert group.prompt_tokens.tolist() == [plain.bos_id, *plain.encode("Anna has 3 apples;")]
    num_prompt = len(plain.encode("Anna has 3 apples;"))
    assert [r.tokens.tolist() for r in group.responses] == [
        [*plain.encode("Anna has 3 apples; how\nmany?")[num_prompt:], plain.eos_id],
        [*plain.encode("Anna has 3 apples;Yes")[num_prompt:], plain.eos_id],
    ]
    assert all(response.mask is None for response in group.responses)
    assert group.prompt_tokens.dtype == group.responses[0].tokens.dtype == np.int32


@pytest.mark.acts("TokenizeOptions.add_bos")
def test_the_beginning_token_is_an_option(plain, tmp_path):
    group, _ = tokenize(plain, "A", "b", "c", add_bos="no")
    assert group.prompt_tokens.tolist() == plain.encode("A")
    folder = make_folder(tmp_path, None, ["<|im_end|>"], None, "<|im_end|>")
    group, _ = tokenize(hugging_face(folder), "A", "b", "c")
    assert group.prompt_tokens.tolist() == hugging_face(folder).encode("A")
    with pytest.raises(DataError, match="--add-bos yes needs"):
        tokenize(hugging_face(folder), "A", "b", "c", add_bos="yes")


def test_empty_texts_are_dropped_and_counted(plain):
    group, counts = tokenize(plain, "A", "b", " \n", "")
    assert [response.index for response in group.responses] == [0]
    assert counts == {why.EMPTY_RESPONSE: 2}
    assert tokenize(plain, " ", "b", "c") == (None, Counter({why.EMPTY_PROMPT: 1}))


def test_what_the_tokenizer_leaves_out_is_empty(train_sentencepiece, tmp_path):
    """SentencePiece's usual normalisation deletes zero-width spaces: the end token would be the whole response."""
    model = str(train_sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True))
    (tmp_path / "chat.jinja").write_text(STYLES["mistral"][0])
    options = TokenizerOptions(kind="SentencePieceTokenizer", model=model, chat_template=str(tmp_path / "chat.jinja"))
    tokenizer = load_tokenizer(options)
    for apply_chat_template in (False, True):
        group, counts = tokenize(
            tokenizer, "A", "b", "\u200b", "!", "\ufeff\n", apply_chat_template=apply_chat_template
        )
        assert [response.index for response in group.responses] == [0, 2]
        assert +counts == {why.EMPTY_RESPONSE: 2}
        nothing = tokenize(tokenizer, "\u200b", "b", apply_chat_template=apply_chat_template)
        assert nothing == (None, Counter({why.EMPTY_PROMPT: 1}))


def test_conversations_agree_with_transformers(chat_folder):
    reference = transformers.AutoTokenizer.from_pretrained(chat_folder)
    prompt, answers = turns("How many apples?"), ("There are 12.", "None =\n 0")
    group, counts = tokenize(hugging_face(chat_folder), prompt, *(turns(a, start="assistant") for a in answers))
    as_dicts = [{"role": m.role, "content": m.content} for m in prompt]
    head = reference.apply_chat_template(as_dicts, add_generation_prompt=True, return_dict=False)
    assert group.prompt_tokens.tolist() == head
    for response, answer in zip(group.responses, answers):
        whole = reference.apply_chat_template([*as_dicts, {"role": "assistant", "content": answer}], return_dict=False)
        row = [*head, *response.tokens.tolist()]
        assert whole[: len(row)] == row
        assert not reference.decode(whole[len(row) :]).strip(), "only white space may follow the end token"
        assert row[-1] in hugging_face(chat_folder).special_ids
        assert reference.decode(response.tokens, skip_special_tokens=True).strip() == answer
        assert response.mask is None
    assert not +counts


def test_only_the_assistants_turns_count(chat_folder):
    tokenizer = hugging_face(chat_folder)
    response = turns("First.", "And then?", "Last 12.", start="assistant")
    group, _ = tokenize(tokenizer, turns("Go on"), response)
    (row,) = group.responses
    assert row.mask.dtype == bool
    assert row.mask[0]
    assert row.mask[-1]
    trained = tokenizer.decode(row.tokens[row.mask])
    masked = tokenizer.decode(row.tokens[~row.mask])
    assert "First." in trained
    assert "Last 12." in trained
    assert "And then?" in masked
    assert "And then?" not in trained
    assert "First." not in masked
    ends = (row.tokens == row.tokens[-1]) & row.mask
    assert ends.sum() == 2, "each of the assistant's turns keeps its end token"


def test_the_end_token_of_a_template_without_one_is_appended_and_trained(tmp_path):
    """Also where a context turn is masked, so that the response has a mask at all."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = hugging_face(make_folder(tmp_path, template, ["<user>", "<assistant>", "</s>"], None, "</s>"))
    response = turns("First.", "And then?", "Last 12.", start="assistant")
    group, _ = tokenize(tokenizer, turns("Go on"), response, turns("Done.", start="assistant"))
    masked, whole = group.responses
    for row in (masked, whole):
        assert row.tokens[-1] == tokenizer.eos_id
        assert (row.tokens == tokenizer.eos_id).sum() == 1
    assert whole.mask is None
    assert tokenizer.decode(masked.tokens[masked.mask]) == tokenizer.decode(
        [*tokenizer.encode("First."), *tokenizer.encode("Last 12."), tokenizer.eos_id]
    )
    assert masked.mask[-1]


@pytest.mark.acts("TokenizeOptions.apply_chat_template")
def test_plain_text_is_wrapped_on_request_and_beside_messages(chat_folder):
    tokenizer = hugging_face(chat_folder)
    expected, _ = tokenize(tokenizer, turns("Q?"), turns("A.", start="assistant"))
    for prompt, response, options in [
        ("Q?", "A.", {"apply_chat_template": True}),
        (turns("Q?"), "A.", {}),
        ("Q?", turns("A.", start="assistant"), {}),
    ]:
        group, _ = tokenize(tokenizer, prompt, response, **options)
        assert group.prompt_tokens.tolist() == expected.prompt_tokens.tolist()
        assert group.responses[0].tokens.tolist() == expected.responses[0].tokens.tolist()


def test_a_merge_across_the_border_is_tokenized_in_pieces(tmp_path):
    # no marker between the turns: "ap" + "ples" would merge into one token
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = hugging_face(make_folder(tmp_path, template, ["</s>"], None, "</s>"))
    prompt, response = turns("Anna has 3 app"), turns("les and", start="assistant")
    joined = tokenizer.encode("Anna has 3 apples and")
    head = tokenizer.encode("Anna has 3 app")
    assert joined[: len(head)] != head, "the case must merge to be one"
    group, counts = tokenize(tokenizer, prompt, response)
    assert group.prompt_tokens.tolist() == head
    assert group.responses[0].tokens.tolist() == [*tokenizer.encode("les and"), tokenizer.eos_id]
    assert counts == {why.RETOKENIZED: 1}


@pytest.mark.acts("TokenizeOptions.prefix_mismatch")
def test_a_template_that_rewrites_the_prompt_is_dropped_or_refused(tmp_path):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = hugging_face(make_folder(tmp_path, template, ["</s>"], None, "</s>"))
    group, counts = tokenize(tokenizer, turns("Q"), turns("A", start="assistant"))
    assert group.responses == ()
    assert counts == {why.NO_PREFIX: 1}
    with pytest.raises(DataError, match=r"^f\.jsonl:3: the chat template renders response 0"):
        tokenize(tokenizer, turns("Q"), turns("A", start="assistant"), prefix_mismatch="error")


def test_conversations_a_template_or_the_rules_refuse_are_named(tmp_path):
    tokenizer = hugging_face(make_folder(tmp_path, *STYLES["mistral"]))
    system = (Message(role="system", content="S"),)
    with pytest.raises(DataError, match=r"^f\.jsonl:3: the chat template refuses .*no system turn"):
        tokenize(tokenizer, system, turns("A", start="assistant"))
    with pytest.raises(DataError, match=r"^f\.jsonl:3: .*must start with the role 'assistant', got 'user'"):
        tokenize(tokenizer, turns("Q"), turns("A"))


# Lengths: the prompt has 1 + 9 tokens, the responses 3 and 6 with their end tokens.
PROMPT, SHORT, LONG = "123456789", "12", "12345"


@pytest.fixture
def digits(train_sentencepiece) -> Tokenizer:
    model = train_sentencepiece(add_dummy_prefix=False)
    return load_tokenizer(TokenizerOptions(kind="SentencePieceTokenizer", model=str(model)))


def lengths(group: TokenizedGroup) -> tuple[int, list[int]]:
    return len(group.prompt_tokens), [len(response.tokens) for response in group.responses]


@pytest.mark.parametrize("policy", ["drop", "truncate-prompt", "truncate-response", "refuse"])
def test_what_fits_is_left_alone(digits, policy):
    group, counts = tokenize(digits, PROMPT, SHORT, LONG, seq_length=16, length_policy=policy)
    assert lengths(group) == (10, [3, 6])
    assert not +counts


def test_drop_leaves_out_what_does_not_fit(digits):
    group, counts = tokenize(digits, PROMPT, SHORT, LONG, seq_length=15)
    assert lengths(group) == (10, [3])
    assert [response.index for response in group.responses] == [0]
    assert counts == {why.TOO_LONG: 1}


@pytest.mark.acts("TokenizeOptions.length_policy", "TokenizeOptions.seq_length")
def test_truncate_response_cuts_the_end(digits):
    group, counts = tokenize(digits, PROMPT, SHORT, LONG, seq_length=14, length_policy="truncate-response")
    assert lengths(group) == (10, [3, 4])
    assert digits.eos_id not in group.responses[1].tokens
    assert [response.is_whole for response in group.responses] == [True, False]
    assert counts == {why.RESPONSE_CUT: 1}


def test_truncate_prompt_keeps_the_beginning_token_and_the_prompts_end(digits):
    group, counts = tokenize(digits, PROMPT, SHORT, LONG, seq_length=13, length_policy="truncate-prompt")
    assert group.prompt_tokens.tolist() == [digits.bos_id, *digits.encode("456789")]
    assert lengths(group) == (7, [3, 6])
    assert not group.is_prompt_whole
    assert +counts == {why.PROMPT_CUT: 1}


def test_truncate_prompt_drops_what_no_prompt_could_make_fit(digits):
    group, counts = tokenize(digits, PROMPT, SHORT, LONG, seq_length=7, length_policy="truncate-prompt")
    assert lengths(group) == (4, [3])
    assert counts == {why.TOO_LONG: 1, why.PROMPT_CUT: 1}


@pytest.mark.parametrize("policy", ["drop", "truncate-response"])
def test_a_prompt_that_leaves_no_room_drops_the_group(digits, policy):
    assert tokenize(digits, PROMPT, SHORT, seq_length=10, length_policy=policy) == (
        None,
        Counter({why.PROMPT_TOO_LONG: 1}),
    )


def test_refuse_names_the_record_and_the_lengths(digits):
    with pytest.raises(DataError, match=r"^f\.jsonl:3: .*--seq-length 15, got 10 \+ 6 tokens"):
        tokenize(digits, PROMPT, SHORT, LONG, seq_length=15, length_policy="refuse")


@pytest.mark.parametrize(
    "options",
    [{"seq_length": 1}, {"seq_length": 8, "length_policy": "cut"}, {"seq_length": 8, "add_bos": "maybe"},
     {"seq_length": 8, "prefix_mismatch": "keep"}],
)  # fmt: skip
def test_contradicting_tokenize_options_are_refused(options):
    with pytest.raises(ConfigError, match="--"):
        TokenizeOptions(**options)
