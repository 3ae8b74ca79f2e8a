"""Writes ``fields.jsonl``: for every field that a test is marked for, the patch that undoes it, and that test.

A field is undone by freezing it: whoever reads it gets one value, its default where it has one. The patch is a decorator
over the class, so that it also holds on ranks and in worker processes. Run it when a mark or a class has changed.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
from test_options import PATCHES, configuration_fields, marks, without_a_patch  # noqa: E402

FROZEN_AT: dict[str, str] = {}
"""Values, as source, for fields without a default, or whose tests use it."""
SEEN_BY: dict[str, str] = {}
"""Of several marked tests, the one to run; otherwise the first by name."""


def patches() -> Iterator[dict[str, str]]:
    """One for each marked field."""
    known = {name: class_name for class_name, names in configuration_fields().items() for name in names}
    marked = marks()
    for field in sorted(marked.keys() - without_a_patch()):
        path, line, value = place_of(known[field], field.split(".")[1])
        yield {
            "field": field,
            "file": str(path.relative_to(ROOT)),
            "old": line,
            "new": f"@{frozen(field.split('.')[1], FROZEN_AT.get(field, value))}\n{line}",
            "what": f"{field} is always {FROZEN_AT.get(field, value)}",
            "test": SEEN_BY.get(field, min(marked[field])),
        }


def place_of(class_name: str, field: str) -> tuple[Path, str, str]:
    """File, the decorator and the head of the class as written, and the field's default as source."""
    for path in sorted((ROOT / "megatron_groupdpo").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == class_name and node.decorator_list:
                first = node.decorator_list[0].lineno
                head = "\n".join(text.splitlines()[first - 1 : node.lineno])
                return path, head, default_of(node, field)
    raise AssertionError(f"no class {class_name}")


def default_of(node: ast.ClassDef, field: str) -> str:
    """As source; of ``field(default=...)`` what it holds, of a factory what it makes."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == field:
            match item.value:
                case ast.Call(func=ast.Name(id="field"), keywords=keywords):
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                    return given.get("default") or f"{given['default_factory']}()"
                case ast.Call(func=ast.Name(id="hyperparameter")) | None:
                    return "None"
                case value:
                    return ast.unparse(value)
    raise AssertionError(f"no field {field}")


def frozen(field: str, value: str) -> str:
    """A decorator, as an expression, that gives every instance ``value`` whatever it was made with."""
    descriptor = (
        f'type("Frozen", (), {{"__get__": lambda s, o, c=None: s if o is None else {value}, '
        f'"__set__": lambda s, o, v: None}})()'
    )
    return f'(lambda cls: setattr(cls, "{field}", {descriptor}) or cls)'


if __name__ == "__main__":
    PATCHES.write_text("".join(json.dumps(patch) + "\n" for patch in patches()), encoding="utf-8")
    print(f"{PATCHES}: {len(PATCHES.read_text().splitlines())} patches")
