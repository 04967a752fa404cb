"""A command's own options and positional arguments, beside the settings that every command takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from server.settings import Settings

SETTINGS_TOO = "Every setting of `quickchange serve` may be given too; `quickchange serve --help` lists them."


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help shows ``description`` as it is written."""
    return argparse.ArgumentParser(
        prog=f"quickchange {command}",
        description=description,
        epilog=SETTINGS_TOO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *, switches: Sequence[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the arguments that are left, which are settings.

    ``switches`` are the command's flags without a value.
    """
    return parser.parse_known_args(bind_values(arguments, switches=switches))


def bind_values(arguments: Sequence[str], *, switches: Sequence[str] = ()) -> list[str]:
    """The arguments with values bound to their flags by '='.

    So a setting's value is never taken for a positional argument.
    """
    fields = Settings.model_fields.items()
    flags = [f"--{name.replace('_', '-')}" for name, field in fields if field.annotation is bool]
    alone = {"--help", "--", *switches, *flags, *(f"--no-{flag[2:]}" for flag in flags)}
    bound: list[str] = []
    pending = False
    for argument in arguments:
        if pending and not argument.startswith("--"):
            bound[-1] = f"{bound[-1]}={argument}"
            pending = False
            continue
        bound.append(argument)
        pending = argument.startswith("--") and "=" not in argument and argument not in alone
    return bound
