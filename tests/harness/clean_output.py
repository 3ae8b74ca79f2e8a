"""Commands one after the other in one process, as each would run in its own; and what in their output is a warning.

python clean_output.py COMMANDS      a JSON list of [file or "-m MODULE", argument, ...]
"""

from __future__ import annotations

import json
import re
import runpy
import sys

_WARNING = re.compile(r"Warning|[Dd]eprecat|^W\d{4} |\bWARN(ING)?\b")


def warnings_in(output: str) -> list[str]:
    """The lines that warn, by Python's or by a library's own means."""
    return [line for line in output.splitlines() if _WARNING.search(line)]


def main() -> None:
    for command, *words in json.loads(sys.argv[1]):
        sys.argv = [command.removeprefix("-m "), *words]
        try:
            if command.startswith("-m "):
                runpy.run_module(command.removeprefix("-m "), run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command, run_name="__main__")
        except SystemExit as exited:
            if exited.code:
                raise


if __name__ == "__main__":
    main()
