"""The pictures of the docs, drawn from the code and from what was measured: ``python docs/images/draw.py``.

``rooms.svg``: the layers of ``tests/unit/test_house.py``, and of every folder its docstring, folders and imports.
``two_passes.svg``: a step in the order of ``step/train_step.py``, and the memory of ``benchmarks/results``.
``tests/unit/test_pictures.py`` fails when a picture is not the one that this script draws.
"""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path

from picture import Picture

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "megatron_groupdpo"
PACKAGE = ROOT / NAME
MEASURED = ROOT / "benchmarks" / "results" / "memory_vs_group_size.json"

# The rooms


def layers() -> list[tuple[str, ...]]:
    """The house test's own table, lowest first, without the package itself."""
    tree = ast.parse((ROOT / "tests" / "unit" / "test_house.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS":
            return [tuple(filter(None, names)) for names in ast.literal_eval(node.value)]
    raise AssertionError("tests/unit/test_house.py has no table LAYERS")


def first_line(module: Path) -> str:
    """What a module or folder says it is."""
    path = module / "__init__.py" if module.is_dir() else module
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, path
    return docstring.splitlines()[0].split(": ``")[0].replace("``", "").rstrip(".")


def imported(module: Path) -> set[str]:
    """Top-level names of the package that a file or folder imports, and ``megatron``."""
    found: set[str] = set()
    for path in sorted(module.rglob("*.py")) if module.is_dir() else [module]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                dotted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in dotted:
                first, _, rest = name.partition(".")
                found |= {rest.partition(".")[0]} if first == NAME else {"megatron"} & {first}
    return found


def draw_rooms() -> Picture:
    """A row for every layer, the highest on top."""
    table = layers()
    words, rooms = table[0], [name for names in reversed(table[1:]) for name in names]
    entries = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in {*words, "__init__"})
    step, top = 56, 62
    picture = Picture(width=900, height=top + step * (len(rooms) + 2) + 14, title="The rooms of the package, in layers")
    picture.text(60, 28, "The rooms of the package: a row imports rows below it, never above", size=15, bold=True)
    picture.text(60, 50, "room, its folders", size=12, ink="dim")
    picture.text(668, 50, "imports", size=12, ink="dim")
    picture.arrow(32, top + 4, 32, top + step * (len(rooms) + 2) - 12)

    def below(names: set[str]) -> list[str]:
        return [room for room in rooms if room in names]

    def row(number: int, name: str, folders: str, what: str, imports: list[str]) -> None:
        y = top + step * number
        picture.box(52, y, 832, step - 8, "core" if name == "mcore/" else "box")
        picture.text(64, y + 20, name, size=14, mono=True, bold=True)
        picture.text(64 + 8.4 * max(12, len(name) + 2), y + 20, folders, size=12, mono=True, ink="link")
        picture.text(64, y + 38, what, size=12, ink="dim")
        for line, text in enumerate(textwrap.wrap(" ".join(imports), 30)):
            picture.text(668, y + 20 + 16 * line, text, size=11, mono=True, ink="dim")

    used = set().union(*(imported(PACKAGE / f"{name}.py") for name in entries))
    row(0, ", ".join(f"{name}.py" for name in entries), "", "Entry points", below(used))
    for number, name in enumerate(rooms, 1):
        folder = PACKAGE / name
        parts = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
        used = imported(folder) - {name}
        row(number, f"{name}/", " ".join(parts), first_line(folder), below(used))
        if "megatron" in used:
            picture.chip(668, top + step * number + 26, "megatron.core", "number", width=112, height=18)
    row(
        len(rooms) + 1,
        ", ".join(words),
        "",
        "Of use to all: the project's words as types, the errors of users, ...",
        [],
    )
    return picture


# The two passes

RESPONSES = (("1", "good"), ("2", "good"), ("3", "bad"), ("4", "bad"), ("5", "bad"), ("6", "bad"))
MICROBATCHES = ((0, 3), (1, 4), (2, 5))


def calls_of_the_step() -> list[str]:
    """What a step calls, in order, where the objective needs a scoring pass and the output layer is."""
    tree = ast.parse((PACKAGE / "step" / "train_step.py").read_text(encoding="utf-8"))
    (step,) = [node for node in tree.body if getattr(node, "name", "") == "accumulate_gradient"]
    with_pass = [node for node in step.body if not isinstance(node, ast.If)]
    calls = [node for part in with_pass for node in ast.walk(part) if isinstance(node, ast.Call)]
    named = [(call.lineno, ast.unparse(call.func)) for call in calls]
    return [name for _, name in sorted(named) if name in {"engine.score", "group_loss", "engine.backward"}]


def draw_two_passes() -> Picture:
    """Score, coefficients, backward from left to right; below, what each holds, and how that grows."""
    calls = calls_of_the_step()
    assert calls == ["engine.score", "group_loss", "engine.backward"], calls
    picture = Picture(width=900, height=640, title="One step: two passes, coupled by one float a response")
    heads = (
        ("1  Score", "forward only, every response"),
        ("2  Coefficients", "where the responses of a group meet"),
        ("3  Backward", "every response on its own"),
    )
    for number, ((head, what), call) in enumerate(zip(heads, calls)):
        x = 16 + 297 * number
        picture.box(x, 16, 274, 330)
        picture.text(x + 14, 42, head, size=16, bold=True)
        picture.text(x + 260, 42, call, size=12, mono=True, ink="link", anchor="end")
        picture.text(x + 14, 62, what, size=12, ink="dim")
    _scoring(picture, 16)
    _coupling(picture, 313)
    _backward(picture, 610)
    picture.arrow(291, 160, 312, 160)
    picture.arrow(588, 160, 609, 160)
    _held(picture, 360)
    _measured(picture, 452)
    return picture


def _microbatches(picture: Picture, x: float) -> list[float]:
    """Rows of two responses, each a microbatch, into the model; where the rows are."""
    picture.text(x + 14, 88, "microbatches", size=11, ink="dim")
    tops = [100.0 + 56 * row for row in range(len(MICROBATCHES))]
    for y, members in zip(tops, MICROBATCHES):
        picture.box(x + 14, y, 80, 34, "page")
        for place, member in enumerate(members):
            name, color = RESPONSES[member]
            picture.chip(x + 20 + 36 * place, y + 6, f"y{name}", color, width=32)
        picture.arrow(x + 96, y + 17, x + 112, y + 17)
    picture.box(x + 114, 96, 54, 154, "core")
    picture.text(x + 141, 178, "model", size=12, anchor="middle")
    return tops


def _scoring(picture: Picture, x: float) -> None:
    for y, members in zip(_microbatches(picture, x), MICROBATCHES):
        picture.arrow(x + 170, y + 17, x + 186, y + 17)
        for place, member in enumerate(members):
            picture.chip(x + 190 + 38 * place, y + 6, f"s{RESPONSES[member][0]}", "number", width=32)
    picture.text(x + 14, 282, "s = β (log π(y) - log π_ref(y))", size=12, mono=True)
    picture.text(x + 14, 308, "one group: y1, y2 positive, the rest", size=12, ink="dim")
    picture.text(x + 14, 326, "negative; anywhere, on any rank", size=12, ink="dim")


def _coupling(picture: Picture, x: float) -> None:
    for place, (name, _) in enumerate(RESPONSES):
        picture.chip(x + 18 + 40 * place, 84, f"s{name}", "number", width=34)
        picture.arrow(x + 35 + 40 * place, 108, x + 35 + 40 * place, 126)
        picture.arrow(x + 35 + 40 * place, 162, x + 35 + 40 * place, 180)
        picture.chip(x + 18 + 40 * place, 182, f"k{name}", "number", width=34)
    picture.box(x + 14, 128, 246, 32, "core")
    picture.text(x + 137, 149, "φ(s1, ..., s6), then autograd", size=12, anchor="middle")
    picture.text(x + 14, 232, "c = dφ/ds", size=12, mono=True)
    picture.text(x + 260, 232, "φ: the objective", size=12, ink="dim", anchor="end")
    picture.text(x + 14, 256, "k = β c / B, less the NLL's part", size=12, mono=True)
    picture.text(x + 14, 290, "One float a response is all that couples", size=12, ink="dim")
    picture.text(x + 14, 308, "a group, over microbatches and ranks:", size=12, ink="dim")
    picture.text(x + 14, 326, "one all-reduce of R floats", size=12, ink="dim")


def _backward(picture: Picture, x: float) -> None:
    for y, members in zip(_microbatches(picture, x), MICROBATCHES):
        picture.arrow(x + 186, y + 11, x + 170, y + 11)
        picture.arrow(x + 170, y + 23, x + 186, y + 23)
        for place, member in enumerate(members):
            picture.chip(x + 190 + 38 * place, y + 6, f"k{RESPONSES[member][0]}", "number", width=32)
    picture.text(x + 14, 282, "gradient of Σ k log π(y)", size=12, mono=True)
    picture.text(x + 14, 308, "forward and backward, added up over", size=12, ink="dim")
    picture.text(x + 14, 326, "the microbatches: dL/dθ, exactly", size=12, ink="dim")


def _held(picture: Picture, y: float) -> None:
    held = (
        ("nothing is kept for a backward;", "logits are there a chunk at a time"),
        ("R scores and R weights:", "8 bytes a response each"),
        ("activations of the microbatches in", "flight, whatever the group's size"),
    )
    for number, lines in enumerate(held):
        x = 16 + 297 * number
        picture.box(x, y, 274, 74, "page")
        picture.text(x + 14, y + 22, "memory held", size=12, bold=True)
        for line, text in enumerate(lines):
            picture.text(x + 14, y + 43 + 18 * line, text, size=12)


def _measured(picture: Picture, y: float) -> None:
    """Bars of the largest length on one pipeline stage."""
    layout = json.loads(MEASURED.read_text(encoding="utf-8"))["layouts"][0]
    length, sizes = max(layout["lengths"]), layout["group_sizes"]
    mib = {
        (point["mode"], point["group_size"]): point["peak_saved"] / 2**20
        for point in layout["points"]
        if point["length"] == length
    }
    picture.box(16, y, 868, 172)
    title = f"Saved for backward, MiB, measured: {layout['name']}, responses of {length} tokens, groups of N"
    picture.text(30, y + 24, title, size=12, bold=True)
    floor, highest = y + 146, max(mib.values())
    for place, size in enumerate(sizes):
        x = 40 + 140 * place
        for side, (mode, color) in enumerate((("decoupled", "good"), ("coupled", "bad"))):
            tall = max(1.5, 84 * mib[mode, size] / highest)
            picture.box(x + 52 * side, floor - tall, 44, tall, color, radius=1)
            picture.text(x + 22 + 52 * side, floor - tall - 5, f"{mib[mode, size]:.3g}", size=11, anchor="middle")
        picture.text(x + 48, floor + 18, f"N = {size}", size=12, anchor="middle")
    picture.chip(674, y + 10, "two passes", "good", width=86)
    picture.chip(770, y + 10, "one graph", "bad", width=86)


PICTURES = {"rooms.svg": draw_rooms, "two_passes.svg": draw_two_passes}


def main() -> None:
    """Write the pictures beside this script."""
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
