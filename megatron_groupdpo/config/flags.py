"""Command lines: flags and ``--help`` made from the fields of a configuration, and how every command refuses."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from megatron_groupdpo.config.coerce import coerce
from megatron_groupdpo.config.options import Option, did_you_mean, options, options_of, sections
from megatron_groupdpo.errors import ConfigError

_EPILOG = (
    "A flag overrides the file. 'none' unsets a field that may be absent. "
    "--global-batch-size counts prompts (groups); --micro-batch-size counts responses of one microbatch; the "
    "learning-rate schedule and --train-samples count groups."
)


def parse_flags(config_class: type, argv: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The ``--config`` path, and what the flags say, unconverted, by field name.

    ``--help`` prints the help and exits.

    Raises:
        ConfigError: an unknown flag, a flag without its value, or a stray argument.
    """
    known, rest = _parser(config_class).parse_known_args(argv)
    given = vars(known)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; fields are given as --name value, see --help.")
    return given.pop("--config", None), given


def add_fields(
    parser: argparse._ActionsContainer,
    section_class: type,
    names: Sequence[str],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Flags for some fields of a section, with the help that training shows for them.

    Args:
        parser: of a command, or a group of its flags.
        section_class: such as ParallelConfig.
        names: its fields.
        defaults: of the command, where they are not the section's.
    """
    known = {option.name: option for option in options_of(section_class)}
    for name in names:
        option = known[name]
        if defaults and name in defaults:
            option = dataclasses.replace(option, default=defaults[name])
            _add_flag(parser, option, default=option.default)
        else:
            _add_flag(parser, option)


def given_fields(args: argparse.Namespace, section_class: type) -> dict[str, Any]:
    """Keywords of a section from the flags of :func:`add_fields`, checked as training checks them.

    Raises:
        ConfigError: a value does not fit its field.
    """
    return {
        option.name: coerce(getattr(args, option.name), option.hint, where=option.flag, choices=option.choices)
        for option in options_of(section_class)
        if option.name in args
    }


def flags_of(option: Option) -> list[str]:
    """``--x``; for a boolean also ``--no-x``, unless its name is a negation itself."""
    negatable = option.hint is bool and not option.name.startswith("no_")
    return [option.flag, f"--no-{option.flag[2:]}"] if negatable else [option.flag]


class _Switch(argparse.Action):
    """``--x``, ``--no-x`` and ``--x true|false``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        assert option_string is not None
        if option_string != self.option_strings[0]:
            if values is not None:
                raise ConfigError(f"{option_string} takes no value; {values!r} was given.")
            values = "false"
        setattr(namespace, self.dest, "true" if values is None else values)


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Without this, argparse repeats the optional value of a switch after each of its spellings.
        if isinstance(action, _Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class _RawFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines."""


class CommandParser(argparse.ArgumentParser):
    """Refuses with a :class:`ConfigError`, one message as every other; an unknown flag with the nearest known one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": _RawFormatter, "allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        """Instead of the usage and exit status 2."""
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Unknown flags are refused first: a mistyped one may be what makes another seem to be missing."""
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the words behind a sub-command are for its own parser
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            for word in words[: words.index("--")] if "--" in words else words:
                name = word.split("=")[0]
                if name.startswith("--") and name not in flags:
                    raise ConfigError(f"unknown flag {name!r}{did_you_mean(name, flags, otherwise='; see --help.')}")
        return super().parse_known_args(words, namespace)


def _parser(config_class: type) -> argparse.ArgumentParser:
    parser = CommandParser(
        usage="%(prog)s --config FILE [--field value ...]",
        description="Fields come from a YAML file of sections, and from flags of the same names.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", dest="--config", metavar="FILE", help="YAML file with the sections below.")
    for section, section_class in sections(config_class).items():
        group = parser.add_argument_group(section, section_class.__doc__)
        for option in options(config_class):
            if option.section == section:
                _add_flag(group, option)
    return parser


def _add_flag(group: argparse._ActionsContainer, option: Option, default: Any = argparse.SUPPRESS) -> None:
    keywords: dict[str, Any] = {
        "dest": option.name,
        "default": default,
        "help": f"{option.doc} ({_default_text(option)})".replace("%", "%%"),
    }
    if option.hint is bool:
        group.add_argument(*flags_of(option), action=_Switch, nargs="?", **keywords)
        return
    if typing.get_origin(option.hint) is tuple:
        keywords["nargs"] = "*"
    group.add_argument(option.flag, metavar=_metavar(option), **keywords)


def _default_text(option: Option) -> str:
    if option.required:
        return "required"
    match option.default:
        case None | ():
            return f"default: {option.unset}"
        case bool(value):
            return f"default: {str(value).lower()}"
        case value:
            return f"default: {value}"


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    hint = option.hint
    if hint == tuple[str, ...]:
        return "PATH"
    while not isinstance(hint, type):
        if typing.get_origin(hint) is Literal:
            return "{" + ",".join(typing.get_args(hint)) + "}"
        hint = typing.get_args(hint)[0]
    return {int: "N", float: "X", str: "TEXT"}[hint]
