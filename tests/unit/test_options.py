"""Every field of every configuration class has a test that sees its effect in numbers, marked ``acts``."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "tests" / "mutations" / "fields.jsonl"
CONFIGURATION = re.compile(r"(Config|Options|Hyperparameters)$|^Partition$")
SECTIONS_ONLY = {"TrainConfig"}
"""Its fields are the sections, which are classes of their own."""


def test_every_field_of_every_configuration_class_is_seen_to_act():
    fields = {name for names in configuration_fields().values() for name in names}
    marked = marks()
    assert not sorted(fields - marked.keys()), "no test is marked acts(...) for these fields"
    assert not sorted(marked.keys() - fields), "tests are marked for fields that are not there"


def test_every_field_has_a_patch_that_undoes_it_and_a_marked_test_to_see_it():
    marked, patched = marks(), set()
    for line in PATCHES.read_text(encoding="utf-8").splitlines():
        patch = json.loads(line)
        text = (ROOT / patch["file"]).read_text(encoding="utf-8")
        assert text.count(patch["old"]) == 1, patch
        assert patch["test"].split("[")[0] in marked[patch["field"]], patch
        patched.add(patch["field"])
    assert patched == marked.keys() - without_a_patch()


def test_what_only_a_gpu_can_show_is_said(record_property: pytest.RecordProperty):
    """What is shown here instead of a number is told: ``-rP`` prints it."""
    for test, field, reason in reasons():
        assert len(reason.split()) > 3, f"{test}: say what is shown for {field}"
        print(f"{field}: {reason} ({test})")


@cache
def configuration_fields() -> dict[str, list[str]]:
    """``Class.field`` of each dataclass that a user fills, by class, from the source alone."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "megatron_groupdpo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or not CONFIGURATION.search(node.name) or node.name in SECTIONS_ONLY:
                continue
            if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                names = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
                assert node.name not in found, f"two classes named {node.name}"
                found[node.name] = [f"{node.name}.{name}" for name in names]
    return found


def marks() -> dict[str, set[str]]:
    """Node ids of the tests that are marked for a field."""
    found: dict[str, set[str]] = {}
    for test, call in _acts():
        for argument in call.args:
            found.setdefault(ast.literal_eval(argument), set()).add(test)
    return found


def reasons() -> list[tuple[str, str, str]]:
    """``(test, field, reason)`` where less than the effect can be shown on a CPU."""
    return [
        (test, ast.literal_eval(argument), ast.literal_eval(keyword.value))
        for test, call in _acts()
        for keyword in call.keywords
        if keyword.arg == "reason"
        for argument in call.args
    ]


def without_a_patch() -> set[str]:
    """Fields whose only admissible value is their default: the tests show the refusal of any other."""
    return {
        ast.literal_eval(argument)
        for _, call in _acts()
        for keyword in call.keywords
        if keyword.arg == "refused"
        for argument in call.args
    }


@cache
def _acts() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.acts":
                        found.append((f"{path.relative_to(ROOT)}::{node.name}", decorator))
    return found
