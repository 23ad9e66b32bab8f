"""Flags of dataclasses: parsed, shown on one screen, refused in plain words."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any


class UsageError(ValueError):
    """A command line that cannot be understood; the exit code is 2."""


def parse(
    program: str,
    classes: Mapping[str, tuple[type, Mapping[str, Any]]],
    arguments: Sequence[str],
    *,
    shown: Collection[str] | None = None,
) -> list[Any] | None:
    """An object of each dataclass from the arguments; None when they asked for help, which is then printed.

    What stood on the command line is in `typed` of each object that has such an attribute.

    Args:
        program: for messages, such as "vlmfast train clip".
        classes: heading -> a dataclass, and defaults in the place of its own.
        arguments: of the command line.
        shown: fields of the last class that --help shows; --help-all shows all. None shows all.
    Raises:
        UsageError: an option is unknown, lacks its value, or has one of another type.
        ValueError: what a dataclass refuses.
    """
    parser = _parser(program, classes, shown, everything="--help-all" in arguments)
    if {"-h", "--help", "--help-all"} & set(arguments):
        print(parser.format_help().rstrip())
        return None
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        options = [action.option_strings[-1] for action in parser._actions if action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    typed = vars(known)
    made = []
    for cls, defaults in classes.values():
        fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
        values = {name: value for name, value in {**defaults, **typed}.items() if name in fields}
        item = cls(**values)
        if hasattr(item, "typed"):
            item.typed = frozenset(typed)
        made.append(item)
    return made


def split(argument: str) -> tuple[str, str, str]:
    """--option=value in its parts; what is no option, or has no value in it, is the first alone."""
    return argument.partition("=") if argument.startswith("--") else (argument, "", "")


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option that decides how the others are read, None where it does not stand there.

    Raises:
        UsageError: nothing follows it.
    """
    found = None
    for k, argument in enumerate(arguments):
        name, equals, value = split(argument)
        if name != option:
            continue
        following = "".join(arguments[k + 1 : k + 2])
        if not equals and (not following or following.startswith("--")):
            raise UsageError(f"argument {option}: expected one argument")
        found = value if equals else following  # the last one counts
    return found


def _parser(
    program: str, classes: Mapping[str, tuple[type, Mapping[str, Any]]], shown: Collection[str] | None, everything: bool
) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(message)

    parser: Any = Parser(
        [], prog=program, usage=f"{program} [options]", formatter_class=_Formatter, add_help=False, allow_abbrev=False
    )
    last = list(classes)[-1]
    for heading, (cls, defaults) in classes.items():
        group = parser.add_argument_group(heading)
        before = len(parser._actions)
        into: Any = Parser([], add_help=False)
        into._add_dataclass_arguments(cls)
        for action in into._actions:
            hidden = heading == last and shown is not None and action.dest not in shown and not everything
            action.help = argparse.SUPPRESS if hidden else _with_default(action, defaults)
            action.default = argparse.SUPPRESS
            group._add_action(action)
        assert len(parser._actions) > before, heading
    if shown is not None:
        parser.epilog = f"All options of transformers' Trainer: {program} --help-all"
    return parser


def _with_default(action: argparse.Action, defaults: Mapping[str, Any]) -> str:
    if action.const is False:  # the --no-... of an option that is on by default
        return f"Turns --{action.dest.replace('_', '-')} off."
    text = (action.help or "").replace("%(default)s", "")
    default = defaults.get(action.dest, action.default)
    default = getattr(default, "value", default)
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    return f"{text} [{default}]" if plain and default != "" else text


class _Formatter(argparse.HelpFormatter):
    """One spelling of each option, with dashes, beside its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = action.option_strings[-1] if action.option_strings else action.dest
        if action.choices is not None:
            return f"{option} {{{','.join(map(str, action.choices))}}}"
        return option if action.nargs in (0, "?") else f"{option} {action.dest.split('_')[-1].upper()}"
