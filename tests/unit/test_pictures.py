"""The docs' pictures are those that the code draws now, and can be read."""

from __future__ import annotations

import importlib
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
NAMES = ("rooms.svg", "two_passes.svg")


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(IMAGES))
    return importlib.import_module("draw")


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_the_code_as_it_is(draw: ModuleType, name: str):
    assert (IMAGES / name).read_text(encoding="utf-8") == draw.PICTURES[name]().svg(), (
        f"{name} is stale: python docs/images/draw.py"
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_text_lies_on_another_or_outside(draw: ModuleType, name: str):
    picture = draw.PICTURES[name]()
    outside = [text.text for text in picture.extents if text.left < 0 or text.right > picture.width]
    assert not outside
    clashes = [
        (one.text, other.text)
        for one, other in combinations(picture.extents, 2)
        if one.left < other.right and other.left < one.right and one.top < other.bottom and other.top < one.bottom
    ]
    assert not clashes


def test_every_picture_is_tested(draw: ModuleType):
    assert set(draw.PICTURES) == set(NAMES) == {path.name for path in IMAGES.glob("*.svg")}
