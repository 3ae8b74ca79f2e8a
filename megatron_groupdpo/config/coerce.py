"""A value from a YAML file, a flag or Python, checked against a field's type."""

from __future__ import annotations

import math
import types
import typing
from typing import Annotated, Any, Literal

from megatron_groupdpo.config.options import did_you_mean
from megatron_groupdpo.config.sections.bounds import Bounds
from megatron_groupdpo.errors import ConfigError


def coerce(value: Any, hint: Any, *, where: str, choices: tuple[str, ...] | None = None) -> Any:
    """``value`` as the type ``hint`` asks for.

    Text is read as numbers and booleans, so that flags and YAML's ``1e-6`` (which YAML 1.1 takes for text) work.
    For a field that may be absent, ``none`` and ``null`` mean None.

    Args:
        value: what was given.
        hint: bool, int, float, str, ``Literal``, ``tuple[X, ...]``, any of them ``Annotated`` or ``| None``.
        where: start of the error message: the flag, or file, line and key.
        choices: further restriction of a str.

    Raises:
        ConfigError: the value does not fit; the message says what would.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return coerce(value, inner, where=where, choices=choices)
    if origin is Annotated:
        number = coerce(value, args[0], where=where, choices=choices)
        for bounds in args[1:]:
            assert isinstance(bounds, Bounds)
            if rule := bounds.broken_by(number):
                raise ConfigError(f"{where} must be {rule}; it is {value}.")
        return number
    if origin is Literal:
        return _one_of(value, args, where)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(coerce(item, args[0], where=where) for item in items)
    if hint is str:
        return _one_of(value, choices, where) if choices else _text(value, where)
    return _SCALARS[hint](value, where)


def _one_of(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else "."
        raise ConfigError(f"{where} must be one of {', '.join(choices)}; it is {_shown(value)}{hint}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where} must be text; it is {_shown(value)}. Quote it if it is meant as text.")
    return value


def _boolean(value: Any, where: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false; it is {_shown(value)}.")
    return value


def _integer(value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError as error:
            raise ConfigError(f"{where} must be an integer; it is {_shown(value)}.") from error
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{where} must be an integer; it is {_shown(value)}.")
    return value


def _real(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where} must be a finite number; it is {_shown(value)}.")
    return number


def _shown(value: Any) -> str:
    return "empty" if value is None else repr(value)


_SCALARS = {bool: _boolean, int: _integer, float: _real}
