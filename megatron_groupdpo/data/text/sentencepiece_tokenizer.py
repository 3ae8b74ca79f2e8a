"""SentencePiece tokenizers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import override

import sentencepiece

from megatron_groupdpo.data.text.templates import (
    END,
    NO_INPUTS,
    START,
    TemplateInputs,
    mark,
    names_pattern,
    render,
    unmarked,
)
from megatron_groupdpo.data.text.tokenizer import Tokenizer, digest_of, squeezed
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import Message


class ControlNames:
    """The control pieces of one model."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        # a name is taken before another that begins it; with no name nothing matches
        names = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or "(?!)"
        self._found = re.compile(f"{START}(?:{names}){END}|(?P<control>{names})")

    def encode(self, rendered: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a rendered conversation; ``encode`` is that of plain text, used between control pieces."""
        ids: list[int] = []
        start = 0
        for match in self._found.finditer(rendered):
            if match["control"] is None:
                continue
            if between := unmarked(rendered[start : match.start()]):
                ids.extend(encode(between))
            ids.append(self._ids[match["control"]])
            start = match.end()
        if rest := unmarked(rendered[start:]):
            ids.extend(encode(rest))
        return ids


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
        return digest_of(self._file.read_bytes(), (self._template or "").encode())

    @override
    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    @override
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        # the library's own batch call starts threads each time, which costs more than it saves for a group
        return [self._processor.encode(text) for text in texts]

    @override
    def encode_rendered(self, text: str) -> list[int]:
        return self._names.encode(text, self._processor.encode)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    @property
    @override
    def chat_source(self) -> str:
        if self._template is None:
            raise DataError(
                f"the SentencePiece tokenizer {self._file} has no chat template, which chat messages need; "
                "give one with --chat-template FILE"
            )
        return self._template

    @override
    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, inputs: TemplateInputs = NO_INPUTS
    ) -> str:
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {name: self._processor.id_to_piece(i) for name, i in named.items() if i is not None}
        return render(
            self.chat_source,
            messages,
            names,
            add_generation_prompt=add_generation_prompt,
            inputs=inputs,
            mark_text=self.mark,
        )

    @functools.cached_property
    @override
    def control_names(self) -> tuple[str, ...]:
        return tuple(self._processor.id_to_piece(i) for i in sorted(self.special_ids))

    @functools.cached_property
    def _names(self) -> ControlNames:
        return ControlNames({self._processor.id_to_piece(i): i for i in self.special_ids})

    @functools.cached_property
    def _controls(self) -> re.Pattern[str] | None:
        return names_pattern(self.control_names)

    @functools.cached_property
    def _written_symbols(self) -> re.Pattern[str] | None:
        """User-defined symbols of the template, which are read from any text."""
        from megatron_groupdpo.data.text.sentencepiece_export import user_defined_symbols

        template = self._template or ""
        return names_pattern([symbol for symbol in user_defined_symbols(self._file) if symbol in template])

    @override
    def mark(self, text: str) -> str:
        if self._written_symbols is not None and (found := self._written_symbols.search(text)):
            raise DataError(
                f"{found[0]!r} in a text is a symbol of the chat template, and SentencePiece reads it as that from any "
                "text; remove it, or drop the record"
            )
        return text if self._controls is None else mark(text, self._controls)

    @functools.cached_property
    @override
    def keeps_all_text(self) -> bool:
        return sum(self._processor.is_byte(i) for i in range(self.vocab_size)) == 256

    @override
    def normalize(self, text: str) -> str:
        return self._processor.normalize(text)

    @override
    def loses_text(self, text: str, ids: Sequence[int]) -> bool:
        # an unknown piece is decoded as " ⁇ "
        return not self.keeps_all_text and squeezed(self.decode(ids)) != squeezed(self.normalize(text))

    @override
    def save(self, folder: Path) -> None:
        from megatron_groupdpo.data.text.sentencepiece_export import export_to_hugging_face

        export_to_hugging_face(self._file, folder, add_bos=self.adds_bos, chat_template=self._template)


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None
