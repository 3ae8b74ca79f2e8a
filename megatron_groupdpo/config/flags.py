"""Command-line flags and ``--help``, made from the fields of a configuration class."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from megatron_groupdpo.config.options import Option, did_you_mean, options, sections
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
        word = rest[0].split("=")[0]
        if word.startswith("--"):
            flags = ["--config", *(flag for option in options(config_class) for flag in flags_of(option))]
            raise ConfigError(f"unknown flag {word!r}{did_you_mean(word, flags, otherwise='; see --help.')}")
        raise ConfigError(f"unexpected argument {word!r}; fields are given as --name value, see --help.")
    return given.pop("--config", None), given


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser(config_class: type) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s --config FILE [--field value ...]",
        description="Fields come from a YAML file of sections, and from flags of the same names.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", dest="--config", metavar="FILE", help="YAML file with the sections below.")
    for section, section_class in sections(config_class).items():
        group = parser.add_argument_group(section, section_class.__doc__)
        for option in options(config_class):
            if option.section == section:
                _add_flag(group, option)
    return parser


def _add_flag(group: argparse._ArgumentGroup, option: Option) -> None:
    text = f"{option.doc} ({_default_text(option)})".replace("%", "%%")
    if option.hint is bool:
        group.add_argument(*flags_of(option), dest=option.name, action=_Switch, nargs="?", help=text)
    elif typing.get_origin(option.hint) is tuple:
        group.add_argument(option.flag, dest=option.name, nargs="*", metavar=_metavar(option), help=text)
    else:
        group.add_argument(option.flag, dest=option.name, metavar=_metavar(option), help=text)


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
