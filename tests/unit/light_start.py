"""A command, started for several command lines with PyTorch and its company out of reach, see :func:`answers`.

    python light_start.py COMMAND CASES

COMMAND is a file, or ``-m MODULE`` in one word with a space; CASES is a JSON list of argument lists, the first of which
must end in SystemExit: it is run here, and what it has imported serves the others, each in a process of its own.
Prints a JSON list of ``[exit status, output, CPU seconds]``.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = frozenset({"torch", "transformers", "datasets", "megatron"})


@dataclass(frozen=True)
class Answer:
    """To one command line."""

    status: int
    output: str
    seconds: float
    """CPU time from the start of the process until here."""


def answers(command: str, *cases: Sequence[str]) -> list[Answer]:
    """Of ``--help``, and of the cases."""
    done = subprocess.run(
        [sys.executable, __file__, command, json.dumps([["--help"], *cases])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return [Answer(*one) for one in json.loads(done.stdout)]


class Refuse(importlib.abc.MetaPathFinder):
    """What takes seconds to import is not there."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in HEAVY:
            # No ImportError: a fallback for an absent package must not hide the wait that its presence costs.
            raise AssertionError(f"{fullname} is imported before the command line is answered")


def start(command: str, words: list[str]) -> int:
    """The exit status of one command line, run in this process."""
    sys.argv = [command.removeprefix("-m "), *words]
    try:
        if command.startswith("-m "):
            runpy.run_module(command.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command, run_name="__main__")
    except SystemExit as exited:
        return exited.code if isinstance(exited.code, int) else int(exited.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def main() -> None:
    command, cases = sys.argv[1], json.loads(sys.argv[2])
    sys.meta_path.insert(0, Refuse())
    answer, results = os.dup(1), []
    for number, words in enumerate(cases):
        with tempfile.TemporaryFile() as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            if number == 0:
                status = start(command, words)
            elif (child := os.fork()) == 0:
                status = start(command, words)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            else:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            sys.stdout.flush()
            sys.stderr.flush()
            output.seek(0)
            results.append([status, output.read().decode(), time.process_time()])
    os.write(answer, json.dumps(results).encode())


if __name__ == "__main__":
    main()
