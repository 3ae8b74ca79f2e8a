"""Names of control pieces in a rendered conversation: the template's are the pieces, those in a content are text.

SentencePiece never reads a control piece from text, so what a template writes is cut out first. Contents are marked
before they are rendered, with the characters that ``transformers`` marks them with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

START, END = "\U000f0000", "\U000f0001"
"""Of a marked name. Private use; as in ``transformers.utils.chat_template_utils``."""


class ControlNames:
    """The control pieces of one model."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        # a name is taken before another that begins it; with no name nothing matches
        names = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or "(?!)"
        self._names = re.compile(names)
        self._found = re.compile(f"{START}(?P<text>{names}){END}|(?P<control>{names})")

    def mark(self, content: str) -> str:
        """The content with every name in it marked as text."""
        return self._names.sub(f"{START}\\g<0>{END}", content)

    def encode(self, rendered: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a rendered conversation; ``encode`` is that of plain text, used between control pieces."""
        ids: list[int] = []
        between: list[str] = []
        last = 0

        def flush() -> None:
            text = "".join(between).replace(START, "").replace(END, "")
            between.clear()
            if text:
                ids.extend(encode(text))

        for match in self._found.finditer(rendered):
            between.append(rendered[last : match.start()])
            last = match.end()
            if match["control"] is None:
                between.append(match["text"])
            else:
                flush()
                ids.append(self._ids[match["control"]])
        between.append(rendered[last:])
        flush()
        return ids
