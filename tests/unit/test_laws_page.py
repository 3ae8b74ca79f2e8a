"""The page on the tests names every break of a law that several ranks hold, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_breaks_of_the_file():
    listed = set()
    for line in (ROOT / "tests" / "mutations" / "laws.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        path, _, name = row["test"].partition("::")
        law, _, case = name.partition("[")
        words = law.removeprefix("test_").replace("_", " ")
        broken = row["file"].removeprefix("megatron_groupdpo/")
        listed.add((path, words, case.removesuffix("]"), f"{row['what']} (`{broken}`)"))
    shown, path = set(), ""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8").partition("<!-- laws -->")[2]
    for line in page.splitlines():
        if (heading := re.fullmatch(r"`(tests/.*)`", line)) is not None:
            path = heading[1]
        elif line.startswith("| ") and not line.startswith("| law |"):
            law, case, broken = (cell.strip() for cell in line.strip("|").split("|"))
            shown.add((path, law, case, broken))
    assert shown == listed
