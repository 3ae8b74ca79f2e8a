"""The fields of a configuration class as a flat table: what the flags, the help and the checks are made from."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of one section."""

    section: str
    name: str
    hint: Any
    """The field's type, ``Annotated`` bounds included."""
    default: Any
    """``dataclasses.MISSING`` where the field is required."""
    doc: str
    choices: tuple[str, ...] | None
    """Allowed values, for a ``str`` field whose choices are known only when the program runs."""
    unset: str
    """What the absence of a value means, for the help."""

    @property
    def flag(self) -> str:
        """``--field-name``."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """True: there is no default."""
        return self.default is dataclasses.MISSING


@cache
def sections(config_class: type) -> dict[str, type]:
    """Section name to its dataclass, in the order of the fields of ``config_class``."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


@cache
def options(config_class: type) -> tuple[Option, ...]:
    """Every field of every section. Field names are unique over the sections, because flags are flat."""
    found = [option for name, section in sections(config_class).items() for option in options_of(section, name)]
    names = [option.name for option in found]
    assert len(set(names)) == len(names), "a field name occurs in two sections; its flag would be ambiguous"
    return tuple(found)


@cache
def options_of(section_class: type, section: str = "") -> tuple[Option, ...]:
    """Every field of one section, which is called ``section``."""
    hints = typing.get_type_hints(section_class, include_extras=True)
    docs = field_docs(section_class)
    return tuple(
        Option(
            section=section,
            name=field.name,
            hint=hints[field.name],
            default=field.default,
            doc=docs.get(field.name, ""),
            choices=field.metadata.get("choices"),
            unset=field.metadata.get("unset", "none"),
        )
        for field in dataclasses.fields(section_class)
    )


def field_docs(section_class: type) -> dict[str, str]:
    """The string under each field, on one line; empty where the source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(section_class)))
    except OSError:
        return {}
    class_node = tree.body[0]
    assert isinstance(class_node, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, below in zip(class_node.body, class_node.body[1:]):
        match node, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like ``word``, case aside; None where none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(word.casefold(), list(by_folded), n=1)
    return by_folded[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = ".") -> str:
    """End of a message on an unknown word: ``; did you mean 'x'?``, or ``otherwise`` where none is near."""
    close = nearest(word, known)
    return f"; did you mean {close!r}?" if close else otherwise
