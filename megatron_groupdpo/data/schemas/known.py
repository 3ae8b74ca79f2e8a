"""Which fields of a record are read, known to change nothing, or refused by name; the rest is reported.

Every schema declares its own; what is said here holds for all. docs/data.md shows the same table (:func:`table`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from megatron_groupdpo.data.schemas.fields import Record, show
from megatron_groupdpo.errors import DataError

_MOST_NAMED = 12  # unknown fields of a record that are counted by name
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")

Reasons = Mapping[str, str]
"""Names, with spaces between, to what is said of them."""

COMMON_READ = "system system_prompt history input tools chat_template_kwargs rendered"
"""Fields that every schema reads."""

COMMON_HARMLESS: Reasons = {
    "id idx index uid uuid row_id prompt_id example_id sample_id conversation_id question_id": "names the record",
    "source sources dataset dataset_name data_source origin split subset config url license": "where it comes from",
    "category categories task task_name task_type subtask domain topic tags type difficulty level": "what it is about",
    "language lang locale country": "its language",
    "model models model_name models_name generator generation_model generation_models": "who wrote the responses",
    "timestamp created created_at date version annotator annotator_id worker_id status": "how it was collected",
    "metadata meta extra extra_info info distilabel_metadata": "notes about the record",
}
"""Fields without a say in what is trained, in any schema."""

COMMON_REFUSED: Reasons = {
    "images image videos video audios audio objects rejected_images": "only text is trained on",
    "functions": "the older form of tools; name them tools",
    "documents": "no prompt here can show them; write them into a turn",
    "rejected_tools rejected_chat_template_kwargs rejected_history": "the responses of a group share one prompt",
    "weight sample_weight loss_weight loss_scale": "all records count alike; drop the record, or repeat it",
    "reasoning_content thinking reasoning": "they belong to a turn: give responses as messages that have them",
}
"""Fields that would change what is trained and that nothing here can honour."""

TURN_READ = "role content from value reasoning_content thinking reasoning tool_calls tool_call_id name weight loss"
"""Fields of a message (``from`` and ``value`` are ShareGPT's)."""

TURN_HARMLESS: Reasons = {
    "id idx index uuid message_id turn turn_id turn_identifier timestamp created model language lang toxic redacted "
    "hashed_ip header country state openai_id finish_reason logprobs refusal annotations": "how the turn came about",
}
TURN_REFUSED: Reasons = {
    "function_call": "the older form of tool_calls; write it so",
    "images image videos video audios audio": "only text is trained on",
    "prefix": "a turn that the response continues: end the prompt with it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFields:
    """What a schema knows of its records. ``list[].key`` is a field of a list's objects, ``A<n>`` a numbered one."""

    formats: str
    """Formats and their versions that come in this form."""
    read: str
    """Names with spaces between."""
    harmless: Reasons = field(default_factory=dict)
    refused: Reasons = field(default_factory=dict)


def _split(reasons: Reasons) -> dict[str, str]:
    return {name: reason for names, reason in reasons.items() for name in names.split()}


class FieldCheck:
    """Looks at all fields of a schema's records; what it costs depends on their shape, which is seen once."""

    def __init__(self, known: KnownFields) -> None:
        read = {*known.read.split(), *COMMON_READ.split()}
        self._harmless = {**_split(COMMON_HARMLESS), **_split(known.harmless)}
        refused = {**_split(COMMON_REFUSED), **_split(known.refused)}
        self._refused = {name: reason for name, reason in refused.items() if name not in read | self._harmless.keys()}
        self._read = read
        self._lists = {name.partition("[]")[0] for name in read if "[]." in name}
        self._numbered = [re.compile(re.escape(name).replace("<n>", r"\d+")) for name in read if "<n>" in name]
        self._odd = lru_cache(maxsize=4096)(self._look)

    def unread(self, record: Record, where: str) -> tuple[str, ...]:
        """Names of unknown fields that hold text; DataError for a field that is refused."""
        found: list[str] = []
        self._object(record, "", "", where, found)
        for key in self._lists:
            entries = record.get(key)
            if isinstance(entries, list | tuple):
                for i, entry in enumerate(entries):
                    if isinstance(entry, dict):
                        self._object(entry, f"{key}[].", f"{key}[{i}].", where, found)
        return tuple(dict.fromkeys(found))[:_MOST_NAMED]

    def _object(self, entry: Record, prefix: str, place: str, where: str, found: list[str]) -> None:
        for key, reason in self._odd(prefix, tuple(entry)):
            value = entry[key]
            if reason is not None:
                if value not in _EMPTY:
                    raise DataError(
                        f"{where}: {place}{key} ({show(value)}) cannot be used: {reason}; remove it, or drop the record"
                    )
            elif not prefix and isinstance(value, dict) and any(f"<name>.{inner}" in self._read for inner in value):
                self._object(value, "<name>.", f"{key}.", where, found)
            elif holds_text(value):
                found.append(f"{prefix}{key}")

    def _look(self, prefix: str, keys: tuple[str, ...]) -> tuple[tuple[str, str | None], ...]:
        """The refused (with the reason) and the unknown (None) of an object's keys."""
        odd = []
        for key in keys:
            name = f"{prefix}{key}"
            if {name, key if prefix else name} & self._harmless.keys() or name in self._read:
                continue
            if not any(pattern.fullmatch(name) for pattern in self._numbered):
                odd.append((key, self._refused.get(name) or self._refused.get(key)))
        return tuple(odd)


def holds_text(value: Any) -> bool:
    """Whether there is anything to read in a value: a text, or lists and objects with one."""
    if isinstance(value, str):
        return bool(value.strip()) and value not in _EMPTY
    if isinstance(value, Mapping):
        return any(map(holds_text, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_text, value))


def table(schemas: Mapping[str, KnownFields]) -> str:
    """The known fields of all schemas as Markdown, for docs/data.md."""
    rows = [
        ("every schema", "", COMMON_READ, COMMON_HARMLESS, COMMON_REFUSED),
        ("a message", "OpenAI's chat API, TRL, ms-swift, ShareGPT", TURN_READ, TURN_HARMLESS, TURN_REFUSED),
        *((f"`{name}`", known.formats, known.read, known.harmless, known.refused) for name, known in schemas.items()),
    ]
    lines = ["| of | formats | read | harmless | refused |", "|---|---|---|---|---|"]
    for of, formats, read, harmless, refused in rows:
        lines.append(f"| {of} | {formats} | {_code(read.split())} | {_listed(harmless)} | {_listed(refused)} |")
    return "\n".join(lines)


def _listed(reasons: Reasons) -> str:
    return "; ".join(f"{_code(names.split())}: {reason}" for names, reason in reasons.items())


def _code(names: Sequence[str] | Iterator[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
