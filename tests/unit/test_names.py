"""Names in prose are names of the tree: paths in backticks, links between pages, dotted modules."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "megatron_groupdpo"
OTHERS = ("transformer_engine/", "megatron/", "torch/", "transformers/", "trl/")
"""Paths of other projects start with the name of their package."""
PATH = re.compile(r"``?([\w./-]*[\w-]\.(?:py|md|sh))``?")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
DOTTED = re.compile(rf"\b{NAME}((?:\.(?!__)\w+)+)")
MADE_UP = "__mutmut_"
"""In names that mutmut makes."""


@cache
def tracked() -> tuple[str, ...]:
    # Files that git does not know yet are somebody's next commit.
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(name for name in found if (ROOT / name).is_file())


def texts() -> list[str]:
    kinds = (".py", ".md", ".sh", ".yaml", ".toml", "Makefile")
    return [name for name in tracked() if name.endswith(kinds) and name != f"tests/unit/{Path(__file__).name}"]


def is_a_file(path: str) -> bool:
    """A file of the tree, by its whole path or the end of it."""
    path = path.removeprefix("./")
    return path.startswith(OTHERS) or any(name == path or name.endswith(f"/{path}") for name in tracked())


def is_a_name(dotted: str) -> bool:
    """A module of the package, or what a module of it defines: ``.run.logs.flops.attention_cost``."""
    here, parts = ROOT / NAME, dotted.strip(".").split(".")
    while parts and (here / parts[0]).is_dir():
        here /= parts.pop(0)
    if parts and (here / f"{parts[0]}.py").is_file():
        source = (here / f"{parts.pop(0)}.py").read_text()
    else:
        source = (here / "__init__.py").read_text()
    return all(re.search(rf"\b{part}\b", source) for part in parts)


def stale(text: str, *, folder: str) -> Iterator[tuple[int, str]]:
    """``(offset, name)`` of what is not there."""
    yield from ((m.start(), m[1]) for m in PATH.finditer(text) if not is_a_file(m[1]))
    yield from ((m.start(), m[0]) for m in DOTTED.finditer(text) if MADE_UP not in m[1] and not is_a_name(m[1]))
    if folder is not None and "](" in text:
        for link in LINK.finditer(text):
            if link[1].endswith((".md", ".py", ".png", ".svg", ".sh")) and not (ROOT / folder / link[1]).exists():
                yield link.start(), link[1]


def test_every_name_in_prose_is_there():
    found = []
    for name in texts():
        text = (ROOT / name).read_text(encoding="utf-8")
        for offset, word in stale(text, folder=str(Path(name).parent)):
            found.append(f"{name}:{text.count(chr(10), 0, offset) + 1}: {word}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "see ``data/partition.py``",
        "`no_such.py`",
        "`docs/no_such.md`",
        "[page](docs/no_such.md#part)",
        "megatron_groupdpo.run.flops.attention_cost",
        "megatron_groupdpo.run.logs.flops.no_such_function",
    ],
)
def test_a_stale_name_is_seen(text: str):
    assert len(list(stale(text, folder="."))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "see ``data/preprocess/partition.py``, `tools/preprocess_data.py` and `transformer_engine/pytorch/utils.py`",
        "[page](docs/data.md#part), [site](https://example.org/x.md)",
        ":func:`megatron_groupdpo.run.logs.flops.attention_cost`, `python -m megatron_groupdpo.doctor`",
    ],
)
def test_a_name_that_is_there_passes(text: str):
    assert list(stale(text, folder=".")) == []
