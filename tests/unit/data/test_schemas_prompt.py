# ruff: noqa: E501 (a record a line)
"""Nothing of a record's prompt is lost or made up: system turn, question, input, tool calls, answer keys."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_groupdpo.data.schemas import SchemaOptions, choose_schema, schema_named
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, Message

PLAIN = SchemaOptions(apply_chat_template=False)
PAIR = {"chosen": "The answer is 4", "rejected": "The thing is not 4"}
TWO = [{"text": "a", "score": 1}, {"text": "b", "score": 2}]
USER = {"role": "user", "content": "Q"}
SYSTEM_S = {"role": "system", "content": "S"}

# Every form with a text prompt "Q"; the system turn must come through all of them.
TEXT_FORMS: list[tuple[str, dict[str, Any]]] = [
    ("canonical", {"prompt": "Q", "responses": TWO}),
    ("pairs", {"question": "Q", **PAIR}),
    ("ultrafeedback", {"instruction": "Q", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}]}),
    ("on_policy", {"prompt": "Q", "responses": ["a", "b"], "rewards": [0, 1]}),
    ("reward", {"prompt": "Q", "A0": "a", "A1": "b", "score_A0": 0, "score_A1": 1}),
    ("nectar", {"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}),
    ("mix_instruct", {"instruction": "Q", "candidates": [{"text": "a", "scores": {"x": 1}}, {"text": "b", "scores": {"x": 2}}]}),
    ("distilabel", {"instruction": "Q", "generations": ["a", "b"], "ratings": [1, 2]}),
    ("nemo_rl", {"context": "Q", "completions": [{"rank": 0, "completion": "a"}, {"rank": 1, "completion": "b"}]}),
    ("helpsteer3", {"context": "Q", "response1": "a", "response2": "b", "overall_preference": 1}),
    ("verified", {"question": "Q", "x": {"solution": "a", "is_correct": True}, "y": {"solution": "b", "is_correct": False}}),
    ("sft", {"question": "Q", "answer": "a"}),
]  # fmt: skip


def read(name: str, record: dict[str, Any], options: SchemaOptions | None = None) -> GroupRecord:
    return schema_named(name).parse(record, "f.jsonl:7", options or SchemaOptions())


def turns(group: GroupRecord) -> list[tuple[str, str]]:
    assert not isinstance(group.prompt, str)
    return [(message.role, message.content) for message in group.prompt]


@pytest.mark.parametrize("key", ["question", "instruction"])
def test_answers_that_begin_alike_are_no_prompt(key):
    record = {key: "What is 2 + 2?", **PAIR}
    assert choose_schema("auto", [(record, "f:1")]).name == "pairs"
    group = read("pairs", record)
    assert group.prompt == "What is 2 + 2?"
    assert [response.text for response in group.responses] == list(PAIR.values())
    assert read("pairs", {**record, "input": "In words."}).prompt == "What is 2 + 2?\nIn words."
    assert read("pairs", {**record, "prompt": "P"}).prompt == "P"


@pytest.mark.parametrize("start", ["The ", "One line.\n", "\nAssistant:", "Ask the Assistant: "])
def test_texts_without_a_prompt_or_a_shared_dialogue_are_refused(start):
    record = {"chosen": start + "a", "rejected": start + "b"}
    with pytest.raises(DataError, match=r"^f\.jsonl:7: the prompt is missing: .* add the field 'prompt'"):
        read("pairs", record)


def test_two_different_questions_are_refused():
    with pytest.raises(DataError, match="question and instruction differ"):
        read("pairs", {"question": "Q", "instruction": "R", **PAIR})


@pytest.mark.parametrize("prompt", [None, ""])
def test_an_empty_prompt_is_not_an_absent_one(prompt):
    start = "\n\nHuman: Q\n\nAssistant:"
    texts = {"chosen": start + " a", "rejected": start + " b"}
    chats = {side: [USER, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    for sides in (texts, chats, PAIR):
        with pytest.raises(DataError, match=rf"^f\.jsonl:7: prompt is {prompt!r}; fill it in"):
            read("pairs", {"prompt": prompt, **sides})


def test_a_question_is_the_prompt_of_answers_in_messages_but_not_of_conversations():
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert read("pairs", {"question": "Q", **sides}).prompt == "Q"
    whole = {side: [USER, *answer] for side, answer in sides.items()}
    group = read("pairs", {"question": "metadata", **whole})
    assert turns(group) == [("user", "Q")]
    assert [len(response.text) for response in group.responses] == [1, 1]


@pytest.mark.acts("SchemaOptions.apply_chat_template")
@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(("name", "record"), TEXT_FORMS)
def test_a_system_field_is_the_first_turn(name, record, key):
    assert turns(read(name, {key: "S", **record})) == [("system", "S"), ("user", "Q")]
    for empty in ("", None):
        assert read(name, {key: empty, **record}, PLAIN).prompt == "Q"
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: {key} \('S'\) .* --apply-chat-template, or remove the field"):
        read(name, {key: "S", **record}, PLAIN)


def test_a_system_field_goes_before_messages():
    for options in (PLAIN, SchemaOptions()):
        group = read("canonical", {"system": "S", "prompt": [USER], "responses": TWO}, options)
        assert turns(group) == [("system", "S"), ("user", "Q")]
    messages = [USER, {"role": "assistant", "content": "a"}]
    swift = {"system": "S", "messages": messages, "rejected_response": "b"}
    assert turns(read("ms_swift", swift, PLAIN)) == [("system", "S"), ("user", "Q")]
    answers = [{"text": [messages[1]]}, {"text": "b"}]
    group = read("canonical", {"system": "S", "prompt": "Q", "responses": answers}, PLAIN)
    assert turns(group) == [("system", "S"), ("user", "Q")]


def test_a_system_field_never_competes_with_another():
    record = {"prompt": [SYSTEM_S, USER], "responses": TWO}
    assert turns(read("canonical", {"system": "S", **record})) == [("system", "S"), ("user", "Q")]
    assert turns(read("canonical", {"system": "S", "system_prompt": "S", **record})) == [("system", "S"), ("user", "Q")]
    with pytest.raises(DataError, match=r"^f\.jsonl:7: system \('T'\) differs from the system turn .*\('S'\)"):
        read("canonical", {"system": "T", **record})
    with pytest.raises(DataError, match=r"^f\.jsonl:7: system and system_prompt differ \('S', 'T'\)"):
        read("canonical", {"system": "S", "system_prompt": "T", **record})
    with pytest.raises(DataError, match=r"^f\.jsonl:7: system must be text"):
        read("canonical", {"system": ["S"], **record})


def test_a_system_field_does_not_fill_an_empty_prompt():
    assert read("canonical", {"system": "S", "prompt": " ", "responses": TWO}).prompt == " "


@pytest.mark.parametrize("name", ["ultrafeedback", "distilabel", "mix_instruct"])
def test_the_input_is_appended_to_the_instruction(name):
    record = dict(next(form for form_name, form in TEXT_FORMS if form_name == name))
    assert read(name, {**record, "input": "I"}).prompt == "Q\nI"
    for empty in ("", None):
        assert read(name, {**record, "input": empty}).prompt == "Q"
    with pytest.raises(DataError, match=r"^f\.jsonl:7: input must be text, got 3"):
        read(name, {**record, "input": 3})
    with pytest.raises(DataError, match=r"^f\.jsonl:7: input \('I'\) cannot be appended to messages"):
        read(name, {**record, "instruction": [USER], "input": "I"})


def test_tool_calls_are_kept_and_empty_ones_are_none():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    for content in ("text", None):
        turn = {"role": "assistant", "content": content, "tool_calls": [call]}
        kept = read("canonical", {"prompt": [USER, turn, USER], "responses": TWO}).prompt[1]
        assert kept.content == (content or "")
        assert '"name": "add", "arguments": {}' in kept.extra
    for empty in ([], None):
        group = read("canonical", {"prompt": [{**USER, "tool_calls": empty}], "responses": TWO})
        assert group.prompt == (Message(role="user", content="Q"),)


@pytest.mark.parametrize("key", ["A01", "A00", "A٣"])
def test_an_answer_number_is_spelled_one_way(key):
    record = {"prompt": "Q", "A0": "a", "A1": "b", "score_A0": 0, "score_A1": 1}
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: answers are named A0, A1, A2, .*{key}"):
        read("reward", {**record, key: "c", f"score_{key}": 2})
    assert len(read("reward", {**record, key: None, "A2": None, "A10": "d", "score_A10": 3}).responses) == 3


def test_the_command_renders_the_system_field_or_refuses_it(tool, write_lines, sentencepiece_model, tmp_path):
    records = write_lines([{"system": "Talk like a pirate.", "question": "What is 2 + 2?", **PAIR}])
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    arguments = ["--input", records, "--output", tmp_path / "out", "--seq-length", 256, "--chat-template", template]
    arguments += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model]
    refused = tool("preprocess_data", *arguments)
    assert refused.returncode == 1
    assert f"error: {records}:1: system ('Talk like a pirate.') is a chat turn" in refused.stderr
    assert not (tmp_path / "out").exists()
    rendered = tool("preprocess_data", *arguments, "--apply-chat-template")
    assert rendered.returncode == 0, rendered.stderr
    assert len(TokenStore.open(tmp_path / "out")) == 1
