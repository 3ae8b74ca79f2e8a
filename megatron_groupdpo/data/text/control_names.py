"""Names of SentencePiece's control pieces in a rendered conversation: the template's are the pieces.

SentencePiece never reads a control piece from text, so what a template writes is cut out first. A name that a record
spells is marked (``templates.py``) and stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from megatron_groupdpo.data.text.templates import END, START, unmarked


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
