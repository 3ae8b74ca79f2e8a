"""Break the package in one known place at a time: the test named for it must go red.

    python tests/mutations/patches.py [WORD ...]        those whose file, test or description has one of the words

Each line of ``*.jsonl`` here is one break: ``file``, ``old`` (there exactly once), ``new``, ``what``, and ``test``, a
pytest node id. It is made in a copy of the tree, and only its test is run. mutmut makes most breaks by itself
(``survivors.py``); these are of constants, of files beyond it, and of laws that several processes hold.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = ("megatron_groupdpo", "tests", "tools", "benchmarks", "examples", "docs", "pyproject.toml", "README.md")
RED, GREEN = 1, 0
"""pytest's answers; any other says that the test did not run."""
SECONDS = 900
"""For one test; more is an endless loop."""
AT_ONCE = 2


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


def begin(tree: Path, tests: Sequence[str], said: Path) -> int:
    """Fork a process that runs ``tests`` on the package of ``tree``, and answers as pytest does; its id."""
    if process := os.fork():
        return process
    answer = 99
    try:
        with said.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        signal.alarm(SECONDS)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        # As a checkout has it, so that tests find the real data, which lie beside that.
        os.environ.setdefault("GROUPDPO_DATA_DIR", str(ROOT.parent / "shared" / "data"))
        import pytest

        answer = int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(answer)


def outcome(status: int, said: Path) -> str:
    """``red``, or what is wrong, from how the process ended."""
    answer = (
        RED if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else os.waitstatus_to_exitcode(status)
    )
    if answer in (RED, GREEN):
        return "red" if answer == RED else "GREEN"
    return f"did not run (pytest answers {answer}):\n{said.read_text(errors='replace')[-2000:]}"


def copy_tree(tree: Path) -> None:
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tree / name)


def import_what_tests_import() -> None:
    """Once, for all forks; nothing of this package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("datasets", "megatron.core.models.gpt", "megatron.core.optimizer", "pytest", "transformers"):
            importlib.import_module(name)

    assert not any(name.split(".")[0] == "megatron_groupdpo" for name in sys.modules)


def run_all(patches: Sequence[Patch], folder: Path) -> int:
    """How many patches were not seen."""
    free = [folder / f"tree{number}" for number in range(AT_ONCE)]
    for tree in free:
        copy_tree(tree)
    status = os.waitpid(begin(free[0], sorted({patch.test for patch in patches}), folder / "said"), 0)[1]
    if (found := outcome(status, folder / "said")) != "GREEN":
        print(f"with nothing broken: {found}\n{(folder / 'said').read_text(errors='replace')[-4000:]}")
        return len(patches)
    wrong, waiting = 0, list(patches)
    running: dict[int, tuple[Patch, Path, str]] = {}

    def tell(patch: Patch, found: str) -> None:
        nonlocal wrong
        wrong += found != "red"
        print(f"{found:6s}  {patch.what:60s}  {patch.test}", flush=True)

    while waiting or running:
        if waiting and free:
            patch, tree = waiting.pop(0), free.pop()
            if (problem := misfit(patch, tree)) is not None:
                tell(patch, problem)
                free.append(tree)
                continue
            whole = (tree / patch.file).read_text(encoding="utf-8")
            (tree / patch.file).write_text(whole.replace(patch.old, patch.new), encoding="utf-8")
            running[begin(tree, [patch.test], tree / "said")] = (patch, tree, whole)
            continue
        process, status = os.wait()
        patch, tree, whole = running.pop(process)
        (tree / patch.file).write_text(whole, encoding="utf-8")
        tell(patch, outcome(status, tree / "said"))
        free.append(tree)
    return wrong


def main(words: Sequence[str]) -> int:
    patches = [
        patch
        for patch in read_patches(HERE)
        if not words or any(word in f"{patch.file} {patch.test} {patch.what}" for word in words)
    ]
    import_what_tests_import()
    with tempfile.TemporaryDirectory(prefix="groupdpo-mutations-") as folder:
        wrong = run_all(patches, Path(folder))
    print(f"{len(patches)} breaks, {wrong} not seen")
    return 1 if wrong or not patches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
