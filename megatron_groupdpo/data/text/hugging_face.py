"""Hugging Face tokenizers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, override

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import pre_tokenizers

from megatron_groupdpo.data.text.sentencepiece_export import save_for_all_readers
from megatron_groupdpo.data.text.templates import END, NO_INPUTS, START, TemplateInputs, mark, names_pattern, render
from megatron_groupdpo.data.text.tokenizer import Tokenizer, digest_of, squeezed
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import Message


class HuggingFaceTokenizer(Tokenizer):
    """Anything ``transformers.AutoTokenizer`` loads from a folder or by name."""

    def __init__(self, model: str, chat_template: str | None = None) -> None:
        import transformers

        looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
        if looks_like_path and not Path(model).expanduser().is_dir():
            raise DataError(f"--tokenizer-model {model}: no such folder; give a folder or a hub name")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(Path(model).expanduser()) if looks_like_path else model
            )
        except Exception as error:
            # transformers raises OSError, ValueError, KeyError and hub errors for one and the same cause
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"--tokenizer-model {model}: no Hugging Face tokenizer could be loaded ({reason}); "
                "give a folder with tokenizer.json, or a name the hub can serve"
            ) from None
        _check_class(self._tokenizer, Path(model).expanduser(), model)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._model = model
        fast, own = transformers.PreTrainedTokenizerFast, type(self._tokenizer)
        self._is_plain_backend = issubclass(own, fast) and all(
            getattr(own, name) is getattr(fast, name) for name in ("__call__", "encode", "_encode_plus")
        )
        """Whether its ids are those of the tokenizers library, without a step of transformers between."""

    @property
    @override
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    @override
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_token_id

    @property
    @override
    def eos_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    @override
    def pad_id(self) -> int | None:
        return self._tokenizer.pad_token_id

    @property
    @override
    def adds_bos(self) -> bool:
        ids = self._tokenizer.encode("a", add_special_tokens=True)
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    @property
    @override
    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder
        return frozenset(i for i, token in added.items() if token.special) | set(self._tokenizer.all_special_ids)

    @property
    @override
    def pieces(self) -> Mapping[str, int]:
        return self._tokenizer.get_vocab()

    @property
    @override
    def chat_template(self) -> Any:
        return self._tokenizer.chat_template

    @property
    @override
    def digest(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # truncation and padding are settings of the last call, not of the tokenizer
            rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        else:
            rules = {"class": type(self._tokenizer).__name__, "vocab": self._tokenizer.get_vocab()}
        template = self._tokenizer.chat_template
        ends = [self.bos_id, self.eos_id]
        return digest_of(json.dumps([rules, template, ends], sort_keys=True).encode())

    @override
    def encode(self, text: str) -> list[int]:
        if self._turn_names is not None and self._turn_names.search(text):
            return self.encode_rendered(mark(text, self._turn_names))
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @override
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._is_plain_backend or self._turn_names is not None:
            return [self.encode(text) for text in texts]
        backend = self._tokenizer.backend_tokenizer
        # as transformers sets it before each of its own calls
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if not backend.encode_special_tokens:
            backend.encode_special_tokens = True
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @override
    def encode_rendered(self, text: str) -> list[int]:
        if START not in text and END not in text:
            return self._tokenizer.encode(text, add_special_tokens=False)
        from transformers.utils.chat_template_utils import encode_marked_chat

        try:
            return encode_marked_chat(self._tokenizer, text)
        except ValueError as error:
            raise DataError(f"{error}; remove it from the text, or drop the record") from None

    @functools.cached_property
    def _turn_tokens(self) -> tuple[str, ...]:
        """Added tokens that are not flagged special and part turns: those that the tokenizer declares
        (``chat_control_tokens``), else those that the template writes around turns that are over. The tokens of
        an answer's own markup (``<think>``, ``<tool_call>``) are not among them."""
        plain = [token.content for token in self._tokenizer.added_tokens_decoder.values() if not token.special]
        declared = getattr(self._tokenizer, "chat_control_tokens", None)
        if declared is not None:
            return tuple(name for name in plain if name in declared)
        plain = [name for name in plain if name.strip()]
        if not plain:
            return ()
        turns = [Message(role=role, content="a") for role in ("user", "assistant", "user")]
        try:
            text = render(self.chat_source, turns, self._tokenizer.special_tokens_map, add_generation_prompt=False)
        except DataError:
            return ()
        return tuple(name for name in plain if name in text)

    @functools.cached_property
    def _turn_names(self) -> re.Pattern[str] | None:
        return names_pattern(self._turn_tokens)

    @functools.cached_property
    @override
    def control_names(self) -> tuple[str, ...]:
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return (*special, *self._turn_tokens)

    @functools.cached_property
    def _controls(self) -> re.Pattern[str] | None:
        return names_pattern(self.control_names)

    @override
    def mark(self, text: str) -> str:
        return text if self._controls is None else mark(text, self._controls)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    @property
    @override
    def chat_source(self) -> str:
        return self._template_for(None)

    def _template_for(self, tools: Sequence[Any] | None) -> str:
        if "Mistral" in type(self._tokenizer).__name__:
            raise DataError(
                f"the tokenizer {self._model} is mistral-common's, which writes chat turns without a template; give a "
                "folder with a tokenizer.json and a chat template"
            )
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise DataError(
                f"the tokenizer {self._model} has no chat template, which chat messages need; "
                "give one with --chat-template FILE"
            )
        try:
            return self._tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several templates, and none named default
            raise DataError(f"the tokenizer {self._model}: {error}; give one with --chat-template FILE") from None

    @override
    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, inputs: TemplateInputs = NO_INPUTS
    ) -> str:
        return render(
            self._template_for(inputs.tools),
            messages,
            self._tokenizer.special_tokens_map,
            add_generation_prompt=add_generation_prompt,
            inputs=inputs,
            mark_text=self.mark,
        )

    @functools.cached_property
    def _rules(self) -> dict[str, Any] | None:
        """The tokenizers library's description; None for a tokenizer in Python."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else json.loads(backend.to_str())

    @functools.cached_property
    @override
    def keeps_all_text(self) -> bool:
        if self._rules is None:
            return False
        steps = self._rules["pre_tokenizer"] or {}
        kinds = [step["type"] for step in steps.get("pretokenizers", [steps]) if step]
        vocab = self._tokenizer.get_vocab()
        if "ByteLevel" in kinds:
            return vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        return bool(self._rules["model"].get("byte_fallback")) and all(f"<0x{i:02X}>" in vocab for i in range(256))

    @override
    def normalize(self, text: str) -> str:
        if self._rules is None or self._rules["normalizer"] is None:
            return text
        if self._rules["normalizer"]["type"] in ("NFC", "NFKC") and text.isascii():
            return text
        return self._tokenizer.backend_tokenizer.normalizer.normalize_str(text)

    @override
    def loses_text(self, text: str, ids: Sequence[int]) -> bool:
        if self.keeps_all_text:
            return False
        if self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in ids:
            return True
        if self._rules is None:
            return not ids
        decoded = self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        return squeezed(decoded) != squeezed(self.normalize(text))

    @override
    def save(self, folder: Path) -> None:
        save_for_all_readers(self._tokenizer, folder)


_PROBES = ("How many apples?  é\n", " naïve 1,000.5\t日本 🙂 x=[1]", "a")


def _check_class(tokenizer: Any, folder: Path, model: str) -> None:
    """DataError where the class that a folder names gives other ids than the folder's own tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return
    own = BackendTokenizer.from_file(str(file))
    for probe in _PROBES:
        expected = own.encode(probe, add_special_tokens=False).ids
        try:
            got: Any = tokenizer.encode(probe, add_special_tokens=False)
        except Exception as error:  # the library raises its base class
            got = f"nothing ({error})"
        if expected != got:
            raise DataError(
                f"--tokenizer-model {model}: its tokenizer_config.json names {type(tokenizer).__name__}, which encodes "
                f"{probe!r} as {got}, and its tokenizer.json as {expected}; set tokenizer_class to "
                "PreTrainedTokenizerFast if tokenizer.json is right"
            )
