"""From a YAML file and flags to a configuration, and back to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_groupdpo.config.coerce import coerce
from megatron_groupdpo.config.flags import parse_flags
from megatron_groupdpo.config.options import did_you_mean, nearest, options, sections
from megatron_groupdpo.config.sections.train_config import TrainConfig
from megatron_groupdpo.errors import ConfigError

type Given = dict[tuple[str, str], Any]
"""Values by (section, field)."""


def load_config(argv: Sequence[str], *, complete: Callable[[Given], Given] = lambda given: given) -> TrainConfig:
    """The configuration of a training run from its command line (without the program's name).

    Types and ranges are checked here; what fields must be together, in :func:`validate`, once the world size is
    known. ``--help`` prints the help and exits.

    Args:
        argv: the words.
        complete: adds values that follow from what is given, before what is missing is refused.

    Raises:
        ConfigError: an unknown key or flag, a value that does not fit its field, a required field not given, or
            a file that cannot be read.
    """
    return load(TrainConfig, argv, complete=complete)


def load[C](
    config_class: type[C], argv: Sequence[str], *, complete: Callable[[Given], Given] = lambda given: given
) -> C:
    """As :func:`load_config`, for any class made of sections."""
    path, flags = parse_flags(config_class, argv)
    given = read_yaml(config_class, Path(path)) if path is not None else {}
    for option in options(config_class):
        if option.name in flags:
            value = coerce(flags[option.name], option.hint, where=option.flag, choices=option.choices)
            given[option.section, option.name] = value
    given = complete(given)
    refuse_missing(config_class, given)
    return config_class(
        **{
            section: section_class(**{name: value for (s, name), value in given.items() if s == section})
            for section, section_class in sections(config_class).items()
        }
    )


def refuse_missing(config_class: type, given: Given, *, but: str | None = None) -> None:
    """Refuse what lacks a required field, those of section ``but`` aside.

    Raises:
        ConfigError: all that are missing.
    """
    missing = [
        option
        for option in options(config_class)
        if option.required and option.section != but and (option.section, option.name) not in given
    ]
    if missing:
        names = ", ".join(f"{option.name} ({option.section})" for option in missing)
        raise ConfigError(f"required and not given: {names}. Set them in the --config file or as flags.")


def to_yaml(config: Any) -> str:
    """The whole configuration, defaults included, as YAML that loads to an equal one."""
    # Escapes outside ASCII: written as they are, PyYAML does not read U+0085 back.
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(config_class: type, path: Path) -> dict[tuple[str, str], Any]:
    """``(section, field)`` to converted value, for what the file sets.

    Raises:
        ConfigError: with ``file:line`` where the file breaks a rule.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        # Nodes, not plain dicts: they know their lines, and show a key that is given twice.
        root = loader.get_single_node()
        given: dict[tuple[str, str], Any] = {}
        for line, section, body in _entries(loader, root, path, "the file"):
            if section not in sections(config_class):
                raise ConfigError(f"{path}:{line}: {_unknown_section(config_class, section)}")
            for line, name, node in _entries(loader, body, path, f"section {section!r}"):
                option = next((o for o in options(config_class) if (o.section, o.name) == (section, name)), None)
                if option is None:
                    raise ConfigError(f"{path}:{line}: {_unknown_key(config_class, section, name)}")
                given[section, name] = coerce(
                    loader.construct_object(node, deep=True),
                    option.hint,
                    where=f"{path}:{line}: {name!r} in {section!r}",
                    choices=option.choices,
                )
        return given
    except yaml.YAMLError as error:
        line = f":{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    finally:
        loader.dispose()


def _entries(
    loader: yaml.SafeLoader, node: yaml.Node | None, path: Path, what: str
) -> list[tuple[int, str, yaml.Node]]:
    """``(line, key, value)`` of a mapping; empty for nothing at all."""
    if node is None or (isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None):
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {what} must be a mapping of names to values.")
    found: list[tuple[int, str, yaml.Node]] = []
    for key_node, value_node in node.value:
        line, key = key_node.start_mark.line + 1, str(loader.construct_object(key_node, deep=True))
        if first := next((earlier for earlier, name, _ in found if name == key), None):
            raise ConfigError(f"{path}:{line}: {key!r} is given twice in {what}, first in line {first}.")
        found.append((line, key, value_node))
    return found


def _unknown_section(config_class: type, section: str) -> str:
    owner = next((o.section for o in options(config_class) if o.name == section), None)
    if owner:
        return f"{section!r} is not a section but a field of section {owner!r}; write it there."
    known = sections(config_class)
    return f"unknown section {section!r}" + did_you_mean(
        section, known, otherwise=f"; the sections are: {', '.join(known)}."
    )


def _unknown_key(config_class: type, section: str, name: str) -> str:
    """The message for a key that its section does not have."""
    message = f"unknown key {name!r} in {section!r}"
    owners = {option.name: option.section for option in options(config_class)}
    if name in owners:
        return f"{message}; it belongs in section {owners[name]!r}."
    own = [known for known, owner in owners.items() if owner == section]
    if not nearest(name, own) and (close := nearest(name, owners)):
        return f"{message}; did you mean {close!r} in section {owners[close]!r}?"
    return message + did_you_mean(name, own, otherwise=f"; its keys are: {', '.join(own)}.")
