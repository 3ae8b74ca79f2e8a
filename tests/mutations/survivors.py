"""Run mutmut, and compare the mutants that no test kills with those that are known to change nothing.

    python tests/mutations/survivors.py [--keep]      --keep: go on with the folder ``mutants`` of an earlier run

What mutmut changes and which tests it runs is in pyproject.toml. ``survivors.md`` lists the mutants that may live,
under the reason why each is equivalent: the function, what it has and what the mutant has. A line that is no longer
found is only reported, since another mutmut makes other mutants.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LISTED = HERE / "survivors.md"
FOLDER = ROOT / "mutants"
NOT_SEEN = {"survived", "no tests", "suspicious", "skipped"}
OVER = {"killed", "timeout", "segfault", "caught by type check"}
_LINE = re.compile(r"- `(?P<function>[^`]+)`: `(?P<old>[^`]*)` → `(?P<new>[^`]*)`")


@dataclass(frozen=True, order=True)
class Mutant:
    """A change by its text: mutmut's numbers move with every line that is added."""

    function: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"- `{self.function}`: `{self.old}` → `{self.new}`"


def listed(text: str) -> set[Mutant]:
    return {Mutant(**match.groupdict()) for match in _LINE.finditer(text)}


def name_of(key: str) -> str:
    """``base.Groups.select`` from mutmut's ``megatron_groupdpo.base.xǁGroupsǁselect__mutmut_3``."""
    module, _, mangled = key.rpartition(".")
    function = re.sub(r"__mutmut_\d+$", "", mangled)
    function = function.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in function else function.removeprefix("x_")
    return f"{module.removeprefix('megatron_groupdpo.')}.{function}"


def mutant_of(key: str, diff: str) -> Mutant:
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    old, new = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return Mutant(name_of(key), old.replace("`", "'"), new.replace("`", "'"))


def statuses() -> dict[str, str]:
    """Of every mutant of the last run."""
    command = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return dict(line.strip().rsplit(": ", 1) for line in said.splitlines() if "__mutmut_" in line)


def texts(keys: Iterable[str]) -> list[Mutant]:
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    os.chdir(ROOT)
    return [mutant_of(key, get_diff_for_mutant(key)) for key in keys]


def main(arguments: Sequence[str]) -> int:
    if "--keep" not in arguments:
        shutil.rmtree(FOLDER, ignore_errors=True)
    # It prints one line over and over.
    with subprocess.Popen([sys.executable, "-m", "mutmut", "run", "--max-children", "2"], cwd=ROOT) as run:
        pass
    if run.returncode:
        print(f"mutmut stopped with {run.returncode}")
        return 1
    found = statuses()
    counts = Counter(found.values())
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    unknown = sorted(key for key, status in found.items() if status not in NOT_SEEN | OVER)
    if unknown or not found:
        print(f"{len(unknown)} of {len(found)} mutants were not run: {', '.join(unknown[:5])}")
        return 1
    alive = set(texts(key for key, status in found.items() if status in NOT_SEEN))
    known = listed(LISTED.read_text(encoding="utf-8"))
    for mutant in sorted(known - alive):
        print(f"listed in {LISTED.name}, and killed or no longer made:\n{mutant}")
    if new := sorted(alive - known):
        print(f"{len(new)} alive that {LISTED.name} does not have; write the test, or add them with the reason:")
        print("\n".join(str(mutant) for mutant in new))
        return 1
    print(f"{len(alive)} alive, every one of them listed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
