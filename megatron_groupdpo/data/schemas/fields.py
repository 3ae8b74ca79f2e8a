"""Checked access to a record's fields: every failure names the place, the rule, the value and the way out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, ResponseRecord, Text

Record = Mapping[str, Any]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaOptions:
    """What a schema cannot know from the record alone."""

    score_weights: Mapping[str, float] | None = None
    """Name of a score -> its weight, for records that give several scores per response. Their weighted sum is
    the value. ``None``: the record must give exactly one."""
    apply_chat_template: bool | None = None
    """Whether plain text will go through the chat template; ``False`` refuses a system field beside plain text.
    ``None``: not known here."""


def weights_from(given: Sequence[str] | None) -> dict[str, float] | None:
    """``--score-weights NAME=WEIGHT ...`` as a mapping; ConfigError on anything else."""
    if given is None:
        return None
    weights: dict[str, float] = {}
    for item in given:
        name, _, weight = item.rpartition("=")
        if name in weights:
            raise ConfigError(f"--score-weights gives {name!r} twice; give each score one weight")
        try:
            weights[name] = float(weight)
        except ValueError:
            name = ""
        if not name or not math.isfinite(weights[name]):
            raise ConfigError(f"--score-weights takes NAME=WEIGHT, got {item!r}; for example helpfulness=1.0")
    return weights


def show(value: Any, limit: int = 80) -> str:
    """``repr`` cut to a length fit for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def field(record: Record, key: str, where: str) -> Any:
    """The value of a required key."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with the key {key!r}, got {show(record)}")
    if key in record and record[key] is None:
        raise DataError(
            f"{where}: the field {key!r} is required, but it is null; fill it in, or leave out what it belongs to"
        )
    if key not in record:
        have = ", ".join(map(str, record)) or "none"
        raise DataError(
            f"{where}: the field {key!r} is required, but the record has {have}; add it, or name another --schema"
        )
    return record[key]


def string(value: Any, name: str, where: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be text, got {show(value)}; write it as a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name} holds half of a surrogate pair (character {error.start}: "
            f"{show(value[error.start])}), which no encoding can write; repair the text"
        ) from None
    return value


def number(value: Any, name: str, where: str) -> float:
    """A finite number within the range of float32, in which values are stored."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {name} must be a number, got {show(value)}; convert it, or leave the response out")
    if not abs(value) <= _LARGEST:  # also false for NaN
        raise DataError(
            f"{where}: {name} must be a finite number that fits 32 bits, got {show(value)}; "
            "correct it, or leave the response out"
        )
    return float(value)


def items(value: Any, name: str, where: str) -> Sequence[Any]:
    """A list."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: {name} must be a list, got {show(value)}")
    return value


def value_of_scores(scores: Any, options: SchemaOptions, name: str, where: str) -> float:
    """One value from ``{name of score: number}`` by ``options.score_weights``."""
    if not isinstance(scores, Mapping) or not scores:
        raise DataError(f"{where}: {name} must be an object of named numbers, got {show(scores)}")
    weights = options.score_weights
    if weights is None:
        if len(scores) > 1:
            raise DataError(
                f"{where}: {name} gives several scores ({', '.join(map(str, scores))}); say which count with "
                f"--score-weights, for example --score-weights {next(iter(scores))}=1"
            )
        weights = {next(iter(scores)): 1.0}
    total = sum(weight * number(field(scores, key, where), f"{name}.{key}", where) for key, weight in weights.items())
    return number(total, f"the weighted sum of {name}", where)


def same_length(first: Sequence[Any], second: Sequence[Any], names: str, where: str) -> None:
    """Refuse two parallel lists of different lengths."""
    if len(first) != len(second):
        raise DataError(f"{where}: {names} must have the same length, got {len(first)} and {len(second)}")


def label_of(value: Any, name: str, where: str) -> int:
    """+1 or -1."""
    if isinstance(value, bool) or value not in (POSITIVE, NEGATIVE):
        raise DataError(f"{where}: {name} must be 1 (positive) or -1 (negative), got {show(value)}")
    return int(value)


def boolean(value: Any, name: str, where: str) -> bool:
    """``true`` or ``false``."""
    if not isinstance(value, bool):
        raise DataError(f"{where}: {name} must be true or false, got {show(value)}")
    return value


def group(prompt: Text, responses: Sequence[ResponseRecord], where: str, *, allow_one: bool = False) -> GroupRecord:
    """A group of at least two responses whose values and labels are all present or all absent."""
    if len(responses) < (1 if allow_one else 2):
        raise DataError(
            f"{where}: a group needs at least 2 responses, got {len(responses)}; add responses, drop the record, "
            "or use --schema sft for single answers"
        )
    for attribute in ("value", "label", "ref_logp"):
        given = sum(getattr(response, attribute) is not None for response in responses)
        if given not in (0, len(responses)):
            raise DataError(
                f"{where}: either every response of a group has a {attribute} or none has, "
                f"got {given} of {len(responses)}; complete the record"
            )
    return GroupRecord(prompt=prompt, responses=tuple(responses), where=where)


def is_list_of(record: Record, key: str, kind: type) -> bool:
    """Whether ``record[key]`` is a list whose first item is a ``kind`` (an empty list counts)."""
    value = record.get(key)
    return isinstance(value, list | tuple) and (not value or isinstance(value[0], kind))
