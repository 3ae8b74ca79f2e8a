"""Short arithmetic problems with worked answers: the verifiable corpus of the demo and of the online loop.

Made for a GPT of a hundred thousand parameters or more, trained from nothing on a CPU. Each problem is solved in
one of three styles, all of them correct: ``direct`` states the answer at once, ``steps`` writes the equations,
``words`` tells them. A policy warm-started on the mixture samples all three and is right more often where it works
step by step, so that groups of sampled responses hold right and wrong ones, and there is something to prefer.

Problems are one line of plain ASCII: sentencepiece folds line breaks into spaces.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Literal, cast, get_args

from megatron_groupdpo.errors import ConfigError, DataError

Split = Literal["train", "held_out"]
Style = Literal["direct", "steps", "words"]
STYLES: tuple[Style, ...] = get_args(Style)

_HELD_OUT_PERCENT = 20
_MAX_MISSES = 10_000
_NAMES = ("Ann", "Ben", "Eva", "Max", "Mia", "Tom")
_THINGS = ("books", "cards", "coins", "cups", "pens", "shells")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One verifiable problem."""

    prompt: str
    answer: str
    """The number alone."""
    worked_solution: str
    """A correct solution ending in ``#### answer``."""
    key: str
    """The arithmetic below the wording: ``sum:-2+3+5`` in whatever words and order. Splits divide keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sum:
    """The arithmetic of a problem: a first number, then numbers added or taken away in order."""

    first: int
    changes: tuple[int, ...]
    """Signed."""

    @property
    def running(self) -> tuple[int, ...]:
        """The values from the first number to the answer."""
        return tuple(accumulate(self.changes, initial=self.first))

    @property
    def key(self) -> str:
        # Sorted: 3 + 5 - 2 and 5 - 2 + 3 are one piece of arithmetic, and belong on one side.
        return "sum:" + "".join(f"{term:+d}" for term in sorted((self.first, *self.changes)))


def split_of(key: str) -> Split:
    """The split a key belongs to, by its hash: one in five is held out, whatever the seed."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return "held_out" if bucket < _HELD_OUT_PERCENT else "train"


def _draw(rng: random.Random, *, num_terms: int, max_value: int) -> _Sum:
    """Every running value stays in [0, max_value]; every term is 1 to 9."""
    first = value = rng.randint(1, min(9, max_value))
    changes = []
    for _ in range(num_terms - 1):
        sign = rng.choice((1, -1))
        if value == (max_value if sign == 1 else 0):
            sign = -sign
        room = max_value - value if sign == 1 else value
        changes.append(sign * rng.randint(1, min(9, room)))
        value += changes[-1]
    return _Sum(first=first, changes=tuple(changes))


def _plain(rng: random.Random, sum_: _Sum) -> str:
    terms = "".join(f" {'+' if change > 0 else '-'} {abs(change)}" for change in sum_.changes)
    return f"What is {sum_.first}{terms}?"


def _story(rng: random.Random, sum_: _Sum) -> str:
    events = "".join(f", {'gets' if change > 0 else 'loses'} {abs(change)}" for change in sum_.changes)
    return f"{rng.choice(_NAMES)} has {sum_.first} {rng.choice(_THINGS)}{events}. How many now?"


_KINDS: dict[str, Callable[[random.Random, _Sum], str]] = {"plain": _plain, "story": _story}
KINDS: tuple[str, ...] = tuple(_KINDS)


def _solution(sum_: _Sum, style: Style) -> str:
    running = sum_.running
    steps = list(zip(running, sum_.changes, running[1:]))
    if style == "direct":
        parts = [f"It is {running[-1]}."]
    elif style == "steps":
        parts = [f"{left} {'+' if change > 0 else '-'} {abs(change)} = {right}." for left, change, right in steps]
    else:
        parts = [
            f"{'Then' if index else 'First'} {left} {'plus' if change > 0 else 'minus'} {abs(change)} makes {right}."
            for index, (left, change, right) in enumerate(steps)
        ]
    return " ".join([*parts, f"#### {running[-1]}"])


def generate(
    num: int,
    *,
    seed: int,
    split: Split,
    kinds: tuple[str, ...] = KINDS,
    styles: tuple[Style, ...] = STYLES,
    num_terms: tuple[int, ...] = (2, 3),
    max_value: int = 18,
    distinct: bool = False,
) -> list[Problem]:
    """Make ``num`` problems; the same arguments give the same problems, a larger ``num`` more after them.

    No key is in both splits, whatever the seeds: :func:`split_of` decides by the key alone.

    Args:
        kinds: wordings to draw from, of :data:`KINDS`. Here and below a value given twice is drawn twice as often.
        styles: styles of the worked solution to draw from, of :data:`STYLES`.
        num_terms: numbers in a problem, each >= 2. More terms are harder, most of all in the style ``direct``.
        max_value: largest value on the way, >= 2. Larger ones take longer to learn: 18 is within reach of a
            hundred thousand parameters and two million tokens.
        distinct: every prompt at most once.

    Raises:
        ConfigError: an argument is out of range, or more distinct problems are asked for than there are.
    """
    _check_names("split", (split,), get_args(Split))
    _check_names("kinds", kinds, KINDS)
    _check_names("styles", styles, STYLES)
    if max_value < 2 or not num_terms or min(num_terms) < 2:
        raise ConfigError(f"max_value and every one of num_terms must be >= 2; got {max_value} and {num_terms}")
    rng = random.Random(f"{seed}/{split}")
    problems: list[Problem] = []
    seen: set[str] = set()
    misses = 0
    while len(problems) < num:
        sum_ = _draw(rng, num_terms=rng.choice(num_terms), max_value=max_value)
        prompt, solution = _KINDS[rng.choice(kinds)](rng, sum_), _solution(sum_, rng.choice(styles))
        if split_of(sum_.key) != split or (distinct and prompt in seen):
            misses += 1
            if misses > _MAX_MISSES:
                raise ConfigError(
                    f"{num} distinct problems asked for, and new ones have run out at {len(problems)} in split "
                    f"'{split}'; ask for fewer, add num_terms or kinds, or set distinct=False"
                )
            continue
        misses = 0
        seen.add(prompt)
        answer = str(sum_.running[-1])
        problems.append(Problem(prompt=prompt, answer=answer, worked_solution=solution, key=sum_.key))
    return problems


def _check_names(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise ConfigError(f"{what} must be among {', '.join(known)}; got {', '.join(map(repr, unknown)) or 'none'}")


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem)) + "\n")
    os.replace(partial, path)


def read_problems(path: Path) -> list[Problem]:
    """Read what :func:`write_problems` wrote, or GSM8K's ``question`` and ``answer`` with ``#### number``.

    Raises:
        DataError: the file is absent or empty, or a line is in neither form.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: problems cannot be read ({error}); give a JSONL file in UTF-8") from error
    problems = [_read_line(line, where=f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise DataError(f"{path}: no problems in it; give a JSONL file with one problem a line")
    return problems


def _read_line(line: str, *, where: str) -> Problem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a JSON object ({error}); one problem a line is expected") from error
    names = [field.name for field in fields(Problem)]
    if isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names):
        return Problem(**{name: cast(str, record[name]) for name in names})
    if isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("question", "answer")):
        solution = record["answer"]
        _, marker, answer = solution.rpartition("####")
        if marker and answer.strip():
            question = record["question"]
            return Problem(prompt=question, answer=answer.strip(), worked_solution=solution, key=f"read:{question}")
    raise DataError(
        f"{where}: not a problem; texts are expected under {', '.join(names)}, "
        "or under question and answer with '#### number' at the end of the answer"
    )
