"""Break the package in one known place at a time: the test named for it must go red.

    python tests/mutations/patches.py [WORD ...]        those whose file, test or description has one of the words

Each line of ``*.jsonl`` here is one break: ``file``, ``old`` (there exactly once), ``new``, ``what``, and ``test``, a
pytest node id. It is made in a copy of the tree, and only its test is run. mutmut makes most breaks by itself
(``survivors.py``); these are of constants, of files beyond it, and of laws that several processes hold.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = ("megatron_groupdpo", "tests", "tools", "benchmarks", "examples", "pyproject.toml", "README.md", "docs")
RED, GREEN = 1, 0
"""pytest's answers; any other says that the test did not run."""
SECONDS = 900


@dataclass(frozen=True)
class Patch:
    """One break."""

    file: str
    old: str
    new: str
    what: str
    test: str


def read_patches(folder: Path) -> list[Patch]:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line) for line in lines if line.strip()]
    return [Patch(**{field.name: each[field.name] for field in fields(Patch)}) for each in found]


def misfit(patch: Patch, tree: Path) -> str | None:
    """Why the patch cannot be made in this tree."""
    path = tree / patch.file
    if not path.is_file():
        return f"{patch.file} is not there"
    if patch.old == patch.new:
        return "it changes nothing"
    count = path.read_text(encoding="utf-8").count(patch.old)
    return None if count == 1 else f"its text is {count} times in {patch.file}, not once"


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's answer, and the end of what it said."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    # As a checkout has it, so that tests find the real data, which lie beside that.
    environment.setdefault("GROUPDPO_DATA_DIR", str(ROOT.parent / "shared" / "data"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return RED, f"no end after {SECONDS} s"
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def outcome_of(patch: Patch, tree: Path) -> str:
    """``red``, or what is wrong."""
    if (problem := misfit(patch, tree)) is not None:
        return problem
    path = tree / patch.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(patch.old, patch.new), encoding="utf-8")
    try:
        answer, said = run_tests(tree, [patch.test])
    finally:
        path.write_text(whole, encoding="utf-8")
    if answer == RED:
        return "red"
    return "GREEN" if answer == GREEN else f"did not run (pytest answers {answer}):\n{said}"


def copy_tree(tree: Path) -> None:
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tree / name)


def main(words: Sequence[str]) -> int:
    patches = [
        patch
        for patch in read_patches(HERE)
        if not words or any(word in f"{patch.file} {patch.test} {patch.what}" for word in words)
    ]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="groupdpo-mutations-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for name in ("one", "two")[: os.cpu_count()]:
            copy_tree(Path(folder) / name)
            trees.put(Path(folder) / name)
        answer, said = run_tests(Path(folder) / "one", sorted({patch.test for patch in patches}))
        if answer != GREEN:
            print(f"the tests are not green with nothing broken (pytest answers {answer}):\n{said}")
            return 1

        def broken(patch: Patch) -> str:
            tree = trees.get()
            try:
                return outcome_of(patch, tree)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(trees.qsize()) as workers:
            for number, (patch, outcome) in enumerate(zip(patches, workers.map(broken, patches)), 1):
                wrong += outcome != "red"
                print(f"{number:3d}/{len(patches)}  {outcome:6s}  {patch.what:60s}  {patch.test}", flush=True)
    print(f"{len(patches)} breaks, {wrong} not seen")
    return 1 if wrong or not patches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
