"""The house rules, held by the source itself: who may import whom, and how long things may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "megatron_groupdpo"
PACKAGE = ROOT / NAME

# Lowest first; the names of one row may import each other. Any other top-level module is an entry point,
# above them all.
LAYERS = (
    ("", "types", "errors", "engine", "tensors", "processes", "lazy_torch"),
    ("objectives",),
    ("config",),  # knows the objectives' names and refuses an option that the chosen one does not use
    ("mcore",),
    ("data",),
    ("step",),
    ("reference",),
    ("convert",),
    ("online",),
    ("run",),
    ("doctor",),
)
HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}
ENTRY_POINT = len(LAYERS)

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
MAX_ENTRIES = 9
"""Files and folders of a folder, ``__init__.py`` not counted: what a newcomer takes in at a look."""
REGISTRIES = {"objectives", "data/schemas", "convert/families"}
"""One file for each of a kind, which may be many."""


def imported_names(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of every import, also inside functions, relative or through importlib.

    ``from a import b`` gives ``a.b``: b may be a module.
    """
    home = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in {"import_module", "__import__", "find_spec"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def height_of(module: str) -> int | None:
    """The layer of a dotted name, None outside the package."""
    first, *rest = module.split(".")
    if first != NAME:
        return None
    owner = rest[0] if rest else ""
    if owner in HEIGHTS:
        return HEIGHTS[owner]
    # `from megatron_groupdpo import __version__` names an attribute of the package, not a module.
    is_module = (PACKAGE / owner).is_dir() or (PACKAGE / f"{owner}.py").is_file()
    return ENTRY_POINT if is_module else 0


def upward_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    own = height_of(module)
    assert own is not None
    return [
        f"line {line}: {module} imports {name}, which lies above it"
        for line, name in imported_names(ast.parse(source), module, is_package=is_package)
        if (height := height_of(name)) is not None and height > own
    ]


def megatron_imports(source: str, module: str) -> list[str]:
    return [
        f"line {line}: {name}"
        for line, name in imported_names(ast.parse(source), module)
        if name.split(".")[0] == "megatron"
    ]


def long_functions(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def report(found: dict[Path, list[str]]) -> str:
    return "\n".join(f"{path.relative_to(ROOT)} {line}" for path, lines in found.items() for line in lines)


def test_imports_only_point_down():
    found = {
        path: upward_imports(path.read_text(), module_name(path), is_package=path.stem == "__init__")
        for path in sources(PACKAGE)
    }
    assert not any(found.values()), report(found)


def rooms_that_import(folder: Path) -> dict[str, set[str]]:
    """For each entry of a folder of the package, the others whose modules it imports."""
    home = module_name(folder)
    entries = {path.stem if path.is_file() else path.name for path in entries_of(folder)}
    edges: dict[str, set[str]] = {name: set() for name in entries}
    for path in sources(folder):
        owner = path.relative_to(folder).parts[0].removesuffix(".py")
        if owner not in entries:
            continue
        for _, name in imported_names(
            ast.parse(path.read_text()), module_name(path), is_package=path.stem == "__init__"
        ):
            target = name.removeprefix(f"{home}.").split(".")[0]
            if name.startswith(f"{home}.") and target in entries - {owner}:
                edges[owner].add(target)
    return edges


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """The names that are left when whatever imports nothing that is left has been taken away, again and again."""
    left = {name: set(targets) for name, targets in edges.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return sorted(left)


def entries_of(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return sorted(path for path in found if path.name != "__init__.py")


def folders_of_the_package() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def test_no_rooms_import_each_other_in_a_circle():
    found = {folder: circle_in(rooms_that_import(folder)) for folder in folders_of_the_package() if folder != PACKAGE}
    assert not any(found.values()), report(found)


def scripts_that_import(folder: Path) -> dict[str, set[str]]:
    """For each file of a folder of scripts, which find each other by bare names, those that it imports."""
    names = {path.stem for path in folder.glob("*.py")}
    edges = {}
    for path in folder.glob("*.py"):
        imported = imported_names(ast.parse(path.read_text()), path.stem)
        edges[path.stem] = {name.split(".")[0] for _, name in imported} & names - {path.stem}
    return edges


@pytest.mark.parametrize("folder", ["benchmarks", "tools"])
def test_no_scripts_import_each_other_in_a_circle(folder: str):
    edges = scripts_that_import(ROOT / folder)
    assert circle_in(edges) == []
    assert folder == "tools" or any(edges.values())  # tools stand alone


def test_a_circle_of_rooms_is_seen():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_a_folder_is_taken_in_at_a_look():
    counts = {folder: len(entries_of(folder)) for folder in folders_of_the_package()}
    full = {
        str(folder.relative_to(PACKAGE)): count
        for folder, count in counts.items()
        if count > MAX_ENTRIES and folder != PACKAGE and str(folder.relative_to(PACKAGE)) not in REGISTRIES
    }
    assert not full, f"more than {MAX_ENTRIES} entries: {full}; make a folder of those of one subject"


def test_only_mcore_imports_megatron():
    # The tests that start ranks may need Megatron in their helpers, never in the test files themselves.
    searched = [
        *(path for path in sources(PACKAGE) if path.relative_to(PACKAGE).parts[0] != "mcore"),
        *sources(ROOT / "tools", ROOT / "examples"),
        *(path for path in sources(ROOT / "tests" / "distributed") if path.stem.startswith("test_")),
    ]
    found = {path: megatron_imports(path.read_text(), module_name(path)) for path in searched}
    assert not any(found.values()), report(found)


def test_files_and_functions_stay_short():
    found = {path: long_functions(path.read_text()) for path in sources(PACKAGE)}
    for path in found:
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            found[path].append(f"has {lines} lines, the limit is {MAX_FILE_LINES}")
    assert not any(found.values()), report(found)


def test_every_module_says_what_it_is():
    silent = [path for path in sources(PACKAGE) if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"no module docstring: {[str(path.relative_to(ROOT)) for path in silent]}"
    bare = {path.parent for path in sources(PACKAGE) if not (path.parent / "__init__.py").is_file()}
    assert not bare, f"no __init__.py: {sorted(str(path.relative_to(ROOT)) for path in bare)}"


def test_every_folder_of_the_package_has_its_layer():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/__init__.py")}
    assert folders - set(HEIGHTS) == set()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("megatron_groupdpo.objectives.dpo", "from megatron_groupdpo.step import score"),
        ("megatron_groupdpo.objectives.dpo", "from ..step.score import score"),
        ("megatron_groupdpo.objectives.dpo", "from megatron_groupdpo import run"),
        ("megatron_groupdpo.mcore.model.build", "def f():\n    import megatron_groupdpo.data.records"),
        ("megatron_groupdpo.types", "importlib.import_module('megatron_groupdpo.objectives')"),
    ],
)
def test_an_upward_import_is_seen(module: str, line: str):
    assert len(upward_imports(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("megatron_groupdpo.step.score", "from megatron_groupdpo.objectives import group_loss"),
        ("megatron_groupdpo.step.score", "from . import coefficients"),
        ("megatron_groupdpo.types", "from megatron_groupdpo.errors import DataError"),
        ("megatron_groupdpo.objectives.dpo", "from megatron_groupdpo import __version__"),
        ("megatron_groupdpo.objectives.dpo", "import torch.distributed"),
    ],
)
def test_a_downward_import_is_allowed(module: str, line: str):
    assert upward_imports(line, module) == []


@pytest.mark.parametrize(
    "line",
    [
        "import megatron.core",
        "from megatron.core import parallel_state",
        "def f():\n    from megatron import core",
        "importlib.import_module('megatron.core')",
    ],
)
def test_an_import_of_megatron_is_seen(line: str):
    assert len(megatron_imports(line, "megatron_groupdpo.data.records")) == 1
    assert megatron_imports("import megatron_groupdpo", "megatron_groupdpo.data.records") == []


def test_a_long_function_is_seen():
    body = "\n".join(["def f():", *["    pass"] * MAX_FUNCTION_LINES])
    assert len(long_functions(body)) == 1
    assert long_functions("\n".join(body.splitlines()[:-1])) == []


def test_test_files_have_names_of_their_own():
    """pytest imports them by bare name: two of one name in different folders stop the whole collection."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)
