"""``make help`` lists every target at a glance; what runs before a commit is what ``make check`` runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
HOOKS: list[dict[str, Any]] = [hook for repo in CONFIG["repos"] for hook in repo["hooks"]]
GROUPS = ["Set up and run", "Test", "Measure", "House keeping"]


def test_make_help_has_every_target_on_a_line_of_its_own_under_a_heading():
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if line]
    assert [line for line in lines if not line.startswith("  make ")] == GROUPS
    assert lines[0] in GROUPS
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert targets
    assert sorted(line.split()[1] for line in lines if line.startswith("  make ")) == sorted(targets[1].split())
    assert [line for line in lines if len(line) > 80] == []


def command_of(hook: dict[str, Any]) -> list[str]:
    """The hook's words, its tool taken from the environment of this Python rather than from .venv."""
    tool, *words = shlex.split(hook["entry"])
    assert tool.startswith(".venv/bin/"), f"{hook['id']}: the tools are those of `make setup`"
    return [str(Path(sys.executable).parent / Path(tool).name), *words]


def test_hooks_fetch_nothing():
    assert {repo["repo"] for repo in CONFIG["repos"]} == {"local"}
    assert {hook["language"] for hook in HOOKS} == {"system"}
    assert not any("additional_dependencies" in hook for hook in HOOKS)


def test_hooks_run_what_make_check_runs():
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe
    checked = [shlex.split(line.replace("$(VENV)/", "")) for line in recipe[1].splitlines()]
    wanted = [[word for word in words if word not in ("--check", ".")] for words in checked]
    hooked = [[Path(tool).name, *words] for tool, *words in map(command_of, HOOKS)]
    for words in wanted:
        assert words in [[word for word in hook if word != "--force-exclude"] for hook in hooked], words


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_has_its_tool_and_its_files(hook: dict[str, Any]):
    tool, *words = command_of(hook)
    assert Path(tool).is_file(), f"{tool} is not installed by the extra dev"
    assert [word for word in words if "/" in word and not (ROOT / word).exists()] == []


def test_the_hook_of_the_format_sees_a_file_that_is_not_formatted(tmp_path: Path):
    (hook,) = [hook for hook in HOOKS if hook["id"] == "ruff-format"]
    source = tmp_path / "source.py"
    source.write_text("x = [1,2]\n")
    subprocess.run([*command_of(hook), str(source)], cwd=ROOT, check=True, capture_output=True)
    assert source.read_text() == "x = [1, 2]\n"
