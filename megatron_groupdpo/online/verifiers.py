"""Verifiers: is a response right? Each is a function of the response and the known answer, registered by name.

To add one, write the function and put :func:`register` over it; everything that names a verifier finds it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE

MARKER = "####"
"""What GSM8K, and this project's problems, put before the final answer."""

# A sign and a currency sign in either order; digits with or without thousands commas; decimals; a denominator.
# A comma elsewhere ends the number: 1,23 is two numbers.
_NUMBER = re.compile(
    r"(?:[-+\u2212]\$?|\$[-+\u2212]?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/[0-9]+)?"
)
_MAX_CHARACTERS = 100
_STATED = re.compile(r"=|\banswer\s+is\b|\banswer\s*:|^A:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier says of one response."""

    score: float
    """In [0, 1]; 1 is right."""
    label: int
    """+1 or -1, as in group records."""
    found: str | None
    """The answer the response gives, as read; None when it gives none."""


Verifier = Callable[[str, str], Verdict]
"""``(response, known answer) -> Verdict``. A response never makes it raise, whatever it holds; a known answer that
cannot be one raises DataError."""

_VERIFIERS: dict[str, Verifier] = {}


def register(name: str) -> Callable[[Verifier], Verifier]:
    """Make a verifier known under ``name``."""

    def keep(verifier: Verifier) -> Verifier:
        assert name not in _VERIFIERS, f"verifier {name!r} is registered twice"
        _VERIFIERS[name] = verifier
        return verifier

    return keep


def verifier_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_VERIFIERS)


def get_verifier(name: str) -> Verifier:
    """The verifier registered under ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name in _VERIFIERS:
        return _VERIFIERS[name]
    close = difflib.get_close_matches(name, _VERIFIERS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"verifier must be one of {', '.join(_VERIFIERS)}; got {name!r}{hint}")


def _value(written: str) -> Fraction | None:
    """The exact value of a match of ``_NUMBER``; None for a division by zero or an absurdly long number."""
    if len(written) > _MAX_CHARACTERS:
        return None
    plain = written.replace("\u2212", "-").replace("$", "").replace(",", "")
    numerator, _, denominator = plain.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def _only_number(text: str) -> tuple[str, Fraction] | None:
    """The number of a text that states one value, once or several times; None when it states none or two."""
    written = _NUMBER.findall(text)
    values = {_value(number) for number in written}
    if len(values) != 1:
        return None
    (value,) = values
    return None if value is None else (written[0], value)


def _marked_number(response: str) -> tuple[str, Fraction] | None:
    """What stands after the last marker, on the first line that holds anything."""
    tail = response.rpartition(MARKER)[2].strip()
    return _only_number(tail.split("\n", 1)[0])


def _stated_number(response: str) -> tuple[str, Fraction] | None:
    """What the last ``=``, ``answer is``, ``answer:`` or line ``A:`` gives, when no other number comes after it."""
    stated = list(_STATED.finditer(response))
    return _only_number(response[stated[-1].end() :]) if stated else None


def _known_value(known: str) -> Fraction:
    number = _marked_number(known) if MARKER in known else _only_number(known)
    if number is None:
        raise DataError(
            f"the known answer must be one number, or a solution ending in '{MARKER} number'; got {known[:200]!r}"
        )
    return number[1]


def _compare(found: tuple[str, Fraction] | None, known: str) -> Verdict:
    right = _known_value(known) == (found[1] if found else None)
    return Verdict(
        score=float(right),
        label=POSITIVE if right else NEGATIVE,
        found=found[0] if found else None,
    )


@register("exact_answer")
def exact_answer(response: str, known: str) -> Verdict:
    """The number after the last ``####``; without that marker, after the last ``=`` or ``answer is``.

    Values are compared exactly: ``1,234``, ``$1234`` and ``1234.0`` are equal. A response that gives two different
    numbers there gives no answer.

    Args:
        known: one number, or a solution ending in ``#### number``.

    Raises:
        DataError: ``known`` is neither.
    """
    return _compare(_marked_number(response) if MARKER in response else _stated_number(response), known)


@register("marked_answer")
def marked_answer(response: str, known: str) -> Verdict:
    """As :func:`exact_answer`, and wrong without the marker ``####``: also teaches the form."""
    return _compare(_marked_number(response) if MARKER in response else None, known)
