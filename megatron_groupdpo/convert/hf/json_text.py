"""Values changed in the text of a JSON file, and nothing else: neither the order of keys nor white space."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BLANK = re.compile(r"[ \t\r\n]*")


def with_values(text: str, changes: Mapping[str, Any]) -> str:
    """The object in ``text`` with some of its values changed; what it did not have is added at its end."""
    spans, first, end = _top_level(text)
    indent = None
    if spans and "\n" in text[first - 1 : spans[0][1]]:
        indent = len(_blank(text, first).rpartition("\n")[2])
    edits = [(start, stop, _dumped(changes[key], indent)) for key, start, stop in spans if key in changes]
    missing = [key for key in changes if key not in {key for key, _, _ in spans}]
    if missing:
        before = (" " if indent is None else _blank(text, first)) if spans else ""
        lines = (f"{before}{json.dumps(key)}: {_dumped(changes[key], indent)}" for key in missing)
        place = spans[-1][2] if spans else end
        edits.append((place, place, ("," if spans else "") + ",".join(lines)))
    for start, stop, new in reversed(edits):
        text = text[:start] + new + text[stop:]
    return text


def _top_level(text: str) -> tuple[list[tuple[str, int, int]], int, int]:
    """Key, start and end of every value of the object; where the first key may begin, and the closing brace is."""
    read = json.JSONDecoder().raw_decode
    first = place = text.index("{") + 1
    spans: list[tuple[str, int, int]] = []
    while True:
        place = _after_blank(text, place)
        if text[place] == "}":
            return spans, first, place
        key, place = read(text, _after_blank(text, place + (text[place] == ",")))
        start = _after_blank(text, text.index(":", place) + 1)
        _, place = read(text, start)
        spans.append((key, start, place))


def _blank(text: str, place: int) -> str:
    match = _BLANK.match(text, place)
    assert match is not None
    return match[0]


def _after_blank(text: str, place: int) -> int:
    return place + len(_blank(text, place))


def _dumped(value: Any, indent: int | None) -> str:
    """As the rest of the file is laid out: nested lines stand one level in."""
    if indent is None:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, indent=indent, ensure_ascii=False).replace("\n", "\n" + " " * indent)
