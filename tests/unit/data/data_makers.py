"""What the data tests make their tokenizers of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    f"Question {i}: Anna has {i} apples and buys {i * 3} more; how many?\n  "
    f"She has {i} + {i * 3} = {i * 4}.\n#### {i * 4}"
    for i in range(300)
] + ["Good morning! What a day (it is)... isn't it? Yes: x = [1, 2]; y = {z}. naïve café"] * 20


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
