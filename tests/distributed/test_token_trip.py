"""The trip on the architecture page is the one that a response takes."""

from __future__ import annotations

import re
from pathlib import Path

import token_trip
from rank_pool import RankPool

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
STAND_IN = "mcore/host_device.py"
"""Tests run on the CPU."""


def test_the_architecture_page_lists_the_files_that_a_response_passes(pool: RankPool, tmp_path: Path):
    ((way, others),) = pool.run(1, token_trip.follow, tmp_path)
    trip, rest = PAGE.read_text(encoding="utf-8").split("Others have it in hand", 1)
    assert re.findall(r"^\d+\. `([\w/]+\.py)`", trip, re.MULTILINE) == [name for name in way if name != STAND_IN]
    assert STAND_IN in way
    assert STAND_IN in rest
    assert sorted(re.findall(r"`((?:run|data)/[\w/]+\.py)` \(", rest)) == sorted(others)
