"""docs/testing.md lists every law of the multi-rank suite with a break that its test catches.

    python tests/unit/test_laws_page.py        write the table anew from ``tests/mutations/laws.jsonl``
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, LAWS = ROOT / "docs" / "testing.md", ROOT / "tests" / "mutations" / "laws.jsonl"
HEAD = "| law | test file | a break that turns it red |\n|---|---|---|\n"


def table() -> str:
    """A row for each test, with all breaks that are listed for it."""
    breaks: dict[tuple[str, str], list[str]] = {}
    for line in LAWS.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        path, name = one["test"].split("[")[0].split("::")
        breaks.setdefault((path, name), []).append(one["what"])
    rows = [
        f"| {name.removeprefix('test_').replace('_', ' ')} | `{Path(path).name}` | {'; '.join(seen)} |\n"
        for (path, name), seen in sorted(breaks.items())
    ]
    return HEAD + "".join(rows)


def test_the_page_has_every_law_with_its_break():
    assert table() in PAGE.read_text(encoding="utf-8"), "python tests/unit/test_laws_page.py writes it anew"


def test_a_listed_law_is_a_test_that_is_there():
    for line in LAWS.read_text(encoding="utf-8").splitlines():
        path, name = json.loads(line)["test"].split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(re.escape(HEAD) + r"(?:\|.*\n)*", lambda _: table(), text), encoding="utf-8")
