"""What the data tests make their tokenizers of, and a disk that fills up."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    f"Question {i}: Anna has {i} apples and buys {i * 3} more; how many?\n  "
    f"She has {i} + {i * 3} = {i * 4}.\n#### {i * 4}"
    for i in range(300)
] + ["Good morning! What a day (it is)... isn't it? Yes: x = [1, 2]; y = {z}. naïve café"] * 20


# Written for these tests in the style of the four families.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
STYLES = {
    "llama3": (LLAMA3, ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin|>", "<|eot_id|>"),  # noqa: E501
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "mistral": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
}  # fmt: skip


def make_folder(folder: Path, template: str | None, special: list[str], bos: str | None, eos: str) -> Path:
    names = {"eos_token": eos} | ({} if bos is None else {"bos_token": bos})
    return train_byte_level(folder, special=special, chat_template=template, **names)


def train_byte_level(folder: Path, *, special: Sequence[str], chat_template: str | None, **names: str) -> Path:
    """A byte-level BPE tokenizer of the kind Llama-3 and Qwen use, saved as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat_template
    fast.save_pretrained(str(folder))
    return folder


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Stands in for a full disk: every write beyond it fails in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
