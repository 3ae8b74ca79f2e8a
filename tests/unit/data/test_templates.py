"""Rows of chat templates against transformers: ids, masks of multi-turn answers, beginning and end tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
from data_makers import STYLES, make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenize import GroupTokenizer, TokenizedGroup, TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.types import GroupRecord, Message, ResponseRecord, Text

# The assistant's content and end token in each style, to be wrapped in transformers' own mark for trained text.
SPANS = {
    "llama3": ("{{ m.content | trim }}<|eot_id|>", "{{ m.content | trim }}<|eot_id|>"),
    "qwen": ("{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|>"),
    "mistral": (" {{ m.content }}{{ eos_token }}", " {{ m.content }}{{ eos_token }}"),
    "gemma": ("{{ m.content | trim }}<end_of_turn>", "{{ m.content | trim }}<end_of_turn>"),
}
END_TOKENS = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
# Earlier answers lose their thoughts, and the last one has a section for them: Qwen 3 does both.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system turn stands before the last user turn, so each new question moves it: Mistral's later templates.
MOVING_SYSTEM = (
    "{{ bos_token }}{% set chat = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% set users = chat | selectattr('role', 'equalto', 'user') | list %}{% for m in chat %}"
    "{% if m.role == 'user' %}[INST] {% if m == users[-1] and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)


def marked(style: str) -> str:
    """The style's template with the assistant's text between ``generation`` marks."""
    template, (content, trained) = STYLES[style][0], SPANS[style]
    assert template.count(content) == 1
    plain = "{% if m.role != 'assistant' %}" + content + "{% endif %}"
    inside = "{% generation %}" + trained + "{% endgeneration %}"
    if style == "mistral":  # its assistant branch holds nothing else
        return template.replace(content, inside)
    # transformers' templates lose a line break after a block, so an empty expression stands between
    return template.replace(content, plain + "{% if m.role == 'assistant' %}" + inside + "{% endif %}{{ '' }}")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {style: make_folder(tmp_path_factory.mktemp(style), *STYLES[style]) for style in STYLES}


def tokenize(
    folder: Path, prompt: Text, *responses: Text, seq_length: int = 4096, **options
) -> tuple[TokenizedGroup, Counter]:
    counts: Counter = Counter()
    tokenizer = load_tokenizer(TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder)))
    record = GroupRecord(prompt=prompt, responses=tuple(ResponseRecord(text=t) for t in responses), where="f:1")
    group = GroupTokenizer(tokenizer, TokenizeOptions(seq_length=seq_length, **options)).tokenize(record, counts)
    assert group is not None
    return group, counts


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def transformers_row(folder: Path, style: str, prompt: tuple[Message, ...], response: tuple[Message, ...]):
    """As transformers gives them: prompt ids, ids of the whole up to the last trained one, their trained mask."""
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    head = reference.apply_chat_template(as_dicts(prompt), add_generation_prompt=True, return_dict=False)
    whole = reference.apply_chat_template(
        as_dicts((*prompt, *response)),
        chat_template=marked(style),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    plain = reference.apply_chat_template(as_dicts((*prompt, *response)), return_dict=False)
    assert whole["input_ids"] == plain, "the marks must not change the text"
    mask = np.array(whole["assistant_masks"], dtype=bool)
    mask[: len(head)] = False  # answers inside the prompt are context
    stop = int(np.flatnonzero(mask)[-1]) + 1
    return head, plain[:stop], mask[:stop]


def compare(
    folder: Path, style: str, prompt: tuple[Message, ...], response: tuple[Message, ...], *, may_merge: bool = False
) -> None:
    group, counts = tokenize(folder, prompt, response)
    head, whole, mask = transformers_row(folder, style, prompt, response)
    (row,) = group.responses
    assert group.prompt_tokens.tolist() == head
    tokens = [*head, *row.tokens.tolist()]
    if counts[why.RETOKENIZED]:
        assert may_merge
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        assert reference.decode(tokens) == reference.decode(whole)
        return
    assert tokens == whole
    trained = np.ones(len(row.tokens), dtype=bool) if row.mask is None else row.mask
    assert trained.tolist() == mask[len(head) :].tolist()
    assert not (+counts).keys() - {why.PROMPT_TRIMMED, why.RESPONSE_TRIMMED}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_before", [1, 3, 5])
@pytest.mark.parametrize("num_after", [1, 3, 5])
def test_rows_and_masks_are_those_of_transformers(folders, style, num_before, num_after):
    texts = ["How many apples?", "There are 12.", "And pears?\n", "None =\n  0", "naïve?", "Yes: x = [1, 2]"] * 2
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts[: num_before + num_after])]
    compare(folders[style], style, chat(*turns[:num_before]), chat(*turns[num_before:]))


@pytest.mark.parametrize("style", ["llama3", "qwen", "gemma"])
def test_a_system_turn_is_context(folders, style):
    prompt = chat(("system", "Be brief."), ("user", "How many?"))
    compare(folders[style], style, prompt, chat(("assistant", "12."), ("user", "Sure?"), ("assistant", "Yes.")))


WORDS = st.text(alphabet=st.sampled_from("ab 139.\n=é日🙂[]/<>_"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(style=st.sampled_from(sorted(STYLES)), texts=st.lists(WORDS, min_size=2, max_size=6))
def test_any_conversation_is_that_of_transformers(folders, style, texts):
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    compare(folders[style], style, chat(turns[0]), chat(*turns[1:]), may_merge=True)


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_ends_with_its_templates_end_of_turn(folders, style):
    group, _ = tokenize(folders[style], chat(("user", "Q")), chat(("assistant", "A.")), "B")
    end = transformers.AutoTokenizer.from_pretrained(folders[style]).convert_tokens_to_ids(END_TOKENS[style])
    for row in group.responses:
        assert row.tokens[-1] == end
        assert (row.tokens == end).sum() == 1
        assert row.mask is None


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_has_one_beginning_token_though_the_tokenizer_adds_its_own(tmp_path, style):
    folder = make_folder(tmp_path, *STYLES[style])
    reference = add_own_bos(folder, end=False)
    group, _ = tokenize(folder, chat(("user", "Q")), chat(("assistant", "A.")))
    begins = [i for i, token in enumerate(group.prompt_tokens) if token == reference.bos_token_id]
    assert begins == ([] if STYLES[style][2] is None else [0])


@pytest.mark.parametrize("end", [False, True])
def test_plain_text_begins_as_the_tokenizer_begins_it_and_never_ends_the_prompt(tmp_path, end):
    folder = make_folder(tmp_path, None, ["<s>", "</s>"], "<s>", "</s>")
    reference = add_own_bos(folder, end=end)
    group, _ = tokenize(folder, "How many?\n", "12", "</s>")
    expected = reference("How many?\n").input_ids
    assert expected[0] == reference.bos_token_id
    assert group.prompt_tokens.tolist() == (expected[:-1] if end else expected)
    assert [row.tokens[-1] for row in group.responses] == [reference.eos_token_id] * 2
    assert [int((row.tokens == reference.eos_token_id).sum()) for row in group.responses] == [1, 1], "text stays text"
    group, _ = tokenize(folder, "How many?\n", "12", add_bos="no")
    assert reference.bos_token_id not in group.prompt_tokens


def add_own_bos(folder: Path, *, end: bool) -> transformers.PreTrainedTokenizerFast:
    """Let the tokenizer write its beginning (and end) token itself, as Llama's do."""
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    bos = fast.bos_token or fast.eos_token
    single = f"{bos} $A {fast.eos_token}" if end else f"{bos} $A"
    names = {bos: fast.convert_tokens_to_ids(bos), fast.eos_token: fast.eos_token_id}
    fast.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=list(names.items()))
    fast.save_pretrained(str(folder))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_a_template_that_changes_earlier_turns_drops_what_it_changes(tmp_path):
    folder = make_folder(tmp_path, THINKING, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>")
    one = chat(("assistant", "A."))
    several = chat(("assistant", "A."), ("user", "Why?"), ("assistant", "So."))
    group, counts = tokenize(folder, chat(("user", "Q")), one, several)
    assert [row.index for row in group.responses] == [0]
    assert +counts == {why.NO_PREFIX: 1}
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert reference.decode(group.responses[0].tokens) == "<think>\n\n</think>\n\nA.<|im_end|>"


def test_a_system_turn_that_moves_drops_what_it_moves_in(tmp_path):
    folder = make_folder(tmp_path, MOVING_SYSTEM, ["<s>", "</s>"], "<s>", "</s>")
    prompt = chat(("system", "Be brief."), ("user", "Q"))
    several = chat(("assistant", "A."), ("user", "Why?"), ("assistant", "So."))
    group, counts = tokenize(folder, prompt, chat(("assistant", "A.")), several)
    assert [row.index for row in group.responses] == [0]
    assert +counts == {why.NO_PREFIX: 1}
    group, counts = tokenize(folder, prompt[1:], several)
    assert len(group.responses) == 1, "without a system turn nothing moves"
    assert not +counts


@pytest.mark.parametrize("style", STYLES)
def test_a_cut_conversation_keeps_its_mask(folders, style):
    prompt = chat(("user", "Q"))
    several = chat(("assistant", "First."), ("user", "And then?"), ("assistant", "Last 12."))
    whole, _ = tokenize(folders[style], prompt, several)
    (row,) = whole.responses
    for length in range(1, len(row.tokens)):
        group, counts = tokenize(
            folders[style],
            prompt,
            several,
            seq_length=len(whole.prompt_tokens) + length,
            length_policy="truncate-response",
        )
        (cut,) = group.responses
        assert cut.tokens.tolist() == row.tokens[:length].tolist()
        assert cut.mask.tolist() == row.mask[:length].tolist()
        assert not cut.is_whole
        assert +counts == {why.RESPONSE_CUT: 1}
