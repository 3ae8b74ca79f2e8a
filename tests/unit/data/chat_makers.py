"""Templates in the manner of models that think, cut and read the clock, and a group as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from data_makers import train_byte_level
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_groupdpo.data.schemas import SchemaOptions, schema_named
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenize import GroupTokenizer, TokenizedGroup, TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows reasoning_content, an empty block where thinking is off, tools and their calls: Qwen3.
THINKING = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% elif m.role == 'assistant' and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}{% for call in m.tool_calls %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# Cuts what stands before </think>, shows no system turn: R1's distilled models.
CUTTING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|im_end|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
# Writes the date and trims: Llama 3.2.
DATED = (
    "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def make_chat_folder(folder: Path, template: str | None, *, added: tuple[str, ...] = (), **names: Any) -> Path:
    """A byte-level tokenizer with ChatML's two special tokens, ``added`` ones that are not special, and a template."""
    train_byte_level(folder, special=SPECIAL, chat_template=template, **{"eos_token": "<|im_end|>", **names})
    if added:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
        tokenizer.save_pretrained(str(folder))
    return folder


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder)))


def tokens_of(
    tokenizer: Tokenizer, schema: str, record: dict[str, Any], **options: Any
) -> tuple[TokenizedGroup, Counter]:
    """A record's tokens, and what was counted."""
    counts: Counter = Counter()
    options = {"seq_length": 4096, **options}
    read = SchemaOptions(apply_chat_template=options.get("apply_chat_template", False))
    group = schema_named(schema).parse(record, "f.jsonl:7", read)
    tokenized = GroupTokenizer(tokenizer, TokenizeOptions(**options)).tokenize(group, counts)
    assert tokenized is not None
    return tokenized, counts


def text_of(tokenizer: Tokenizer, schema: str, record: dict[str, Any], **options: Any) -> tuple[str, list[str]]:
    """A record's prompt, and what is trained of each response, as the tokens spell them."""
    group, _ = tokens_of(tokenizer, schema, record, **options)
    trained = [row.tokens if row.mask is None else row.tokens[row.mask] for row in group.responses]
    return tokenizer.decode(group.prompt_tokens.tolist()), [tokenizer.decode(tokens.tolist()) for tokens in trained]
