"""One face for SentencePiece and Hugging Face tokenizers.

``encode`` never adds special tokens: where a beginning or an end token goes is decided in ``tokenize.py``,
in the open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, override

import sentencepiece

from megatron_groupdpo.data.text.control_names import ControlNames
from megatron_groupdpo.data.text.saved import save_for_all_readers
from megatron_groupdpo.data.text.sentencepiece_export import export_to_hugging_face
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import Message

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
_ALIASES = {"GPTSentencePieceTokenizer": "SentencePieceTokenizer", "Llama2Tokenizer": "SentencePieceTokenizer"}
"""Megatron's other spellings for the same files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerOptions:
    """Which tokenizer to load."""

    kind: str
    """``SentencePieceTokenizer`` (also ``GPTSentencePieceTokenizer``) or ``HuggingFaceTokenizer``."""
    model: str
    """A ``.model`` file; for Hugging Face a folder or a hub name."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""


class Tokenizer(Protocol):
    """What the data and the export need from a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; every id is below it."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Beginning token."""
        ...

    @property
    def eos_id(self) -> int | None:
        """End token."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Padding token; None where the tokenizer names none."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own convention puts ``bos_id`` before a text."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens (beginning, end, turn markers)."""
        ...

    @property
    def pieces(self) -> Mapping[str, int]:
        """The vocabulary: the id of every piece, added tokens included."""
        ...

    @property
    def chat_template(self) -> Any:
        """The chat template (of a few tokenizers, several by name); None where there is none."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the ids, the chat template included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens around it. A control token's name in the text is text."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each text."""
        ...

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of text that a chat template wrote: names of special tokens in it become those tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        ...

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text; DataError without a chat template or where it refuses the messages."""
        ...

    def save(self, folder: Path) -> None:
        """Write files from which ``transformers.AutoTokenizer`` gives the same ids."""
        ...


def canonical_kind(kind: str) -> str:
    """The project's own name of a kind of tokenizer; ConfigError for an unknown one."""
    kind = _ALIASES.get(kind, kind)
    if kind not in get_args(TokenizerType):
        known = ", ".join([*get_args(TokenizerType), *_ALIASES])
        raise ConfigError(f"--tokenizer-type must be one of {known}, got {kind!r}")
    return kind


def load_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Load the tokenizer.

    Raises:
        ConfigError: unknown kind.
        DataError: the model is not there or is not of that kind.
    """
    kind = canonical_kind(options.kind)
    template = None
    if options.chat_template is not None:
        template = _read_template(options.chat_template)
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(options.model, template)
    return HuggingFaceTokenizer(options.model, template)


def apply_chat_template(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """Ids of a conversation."""
    text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode_rendered(text)


class SentencePieceTokenizer(Tokenizer):
    """A ``.model`` file. User-defined symbols are read from text; control symbols never are."""

    def __init__(self, model: str, chat_template: str | None = None) -> None:
        self._file = Path(model)
        if not self._file.is_file():
            raise DataError(f"--tokenizer-model {model}: no such file; give the path of a SentencePiece .model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"--tokenizer-model {model}: not a SentencePiece model ({error})") from None
        self._template = chat_template
        self._controls = ControlNames({self._processor.id_to_piece(i): i for i in self.special_ids})

    @property
    @override
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    @property
    @override
    def bos_id(self) -> int | None:
        return _id_or_none(self._processor.bos_id())

    @property
    @override
    def eos_id(self) -> int | None:
        return _id_or_none(self._processor.eos_id())

    @property
    @override
    def pad_id(self) -> int | None:
        return _id_or_none(self._processor.pad_id())

    @property
    @override
    def adds_bos(self) -> bool:
        return self.bos_id is not None

    @property
    @override
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i in range(self.vocab_size) if self._processor.is_control(i))

    @property
    @override
    def pieces(self) -> Mapping[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    @property
    @override
    def chat_template(self) -> str | None:
        return self._template

    @property
    @override
    def digest(self) -> str:
        return _digest(self._file.read_bytes(), (self._template or "").encode())

    @override
    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    @override
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        # the library's own batch call starts threads each time, which costs more than it saves for a group
        return [self._processor.encode(text) for text in texts]

    @override
    def encode_rendered(self, text: str) -> list[int]:
        return self._controls.encode(text, self._processor.encode)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    @override
    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if self._template is None:
            raise DataError(
                f"the SentencePiece tokenizer {self._file} has no chat template, which chat messages need; "
                "give one with --chat-template FILE"
            )
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {name: self._processor.id_to_piece(i) for name, i in named.items() if i is not None}
        marked = [replace(message, content=self._controls.mark(message.content)) for message in messages]
        return _render(self._template, marked, add_generation_prompt, names)

    @override
    def save(self, folder: Path) -> None:
        export_to_hugging_face(self._file, folder, add_bos=self.adds_bos, chat_template=self._template)


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
        return _digest(json.dumps([rules, template, ends], sort_keys=True).encode())

    @override
    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @override
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._is_plain_backend:
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
        return self._tokenizer.encode(text, add_special_tokens=False)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    @override
    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer {self._model} has no chat template, which chat messages need; "
                "give one with --chat-template FILE"
            )
        with _template_errors(messages):
            return self._tokenizer.apply_chat_template(
                _as_dicts(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )

    @override
    def save(self, folder: Path) -> None:
        save_for_all_readers(self._tokenizer, folder)


def _render(template: str, messages: Sequence[Message], add_generation_prompt: bool, names: Mapping[str, str]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **names}
    with _template_errors(messages):
        rendered = render_jinja_template([_as_dicts(messages)], chat_template=template, **arguments)
    return rendered[0][0]


@contextmanager
def _template_errors(messages: Sequence[Message]) -> Iterator[None]:
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        roles = [message.role for message in messages]
        raise DataError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {file}: cannot be read ({error})") from None


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _digest(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
