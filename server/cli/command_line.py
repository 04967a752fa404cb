"""Parsing of settings and of a command's own options, and printing of lines."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import get_args

from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsError as UnreadableSettings

from cpu_kernels.tiers import TierRefused, use_tier
from server.errors import SettingsError
from server.logs import log_as_json
from server.settings import Settings

SETTINGS_TOO = "Every setting of `quickchange serve` is accepted too; `quickchange serve --help` lists them."

_LABEL_CHARS = 13


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of ``description``."""
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
    """A command's own options, and the remaining arguments, which are settings.

    ``switches`` are the command's flags without a value.
    """
    return parser.parse_known_args(bind_values(arguments, switches=switches))


def bind_values(arguments: Sequence[str], *, switches: Sequence[str] = ()) -> list[str]:
    """The arguments with each value joined to its flag by '=', so that none is parsed as a positional argument."""
    fields = Settings.model_fields.items()
    flags = [f"--{name.replace('_', '-')}" for name, field in fields if field.annotation is bool]
    valueless = {"--help", "--", *switches, *flags, *(f"--no-{flag[2:]}" for flag in flags)}
    bound: list[str] = []
    pending = False
    for argument in arguments:
        if pending and not argument.startswith("--"):
            bound[-1] = f"{bound[-1]}={argument}"
            pending = False
            continue
        bound.append(argument)
        pending = argument.startswith("--") and "=" not in argument and argument not in valueless
    return bound


def parse_settings(command: str, arguments: Sequence[str]) -> Settings:
    """The settings of a command. Raises ``SettingsError`` that names field, value and remedy."""
    try:
        settings = Settings(
            _cli_parse_args=list(arguments),
            _cli_prog_name=f"quickchange {command}",
            _cli_kebab_case="all",
            _cli_implicit_flags=True,
            _cli_hide_none_type=True,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        is_secret = SecretStr in get_args(Settings.model_fields[str(first["loc"][0])].annotation)
        value = "not shown, as it is a secret" if is_secret else repr(first["input"])
        raise SettingsError(
            f"setting {field} (--{field.replace('_', '-')} or QUICKCHANGE_{field.upper()}) is {value}: "
            f"{first['msg'].removeprefix('Value error, ')}"
        ) from None
    except UnreadableSettings as error:
        raise SettingsError(str(error)) from None
    try:
        use_tier(settings.cpu)
    except TierRefused as error:
        raise SettingsError(str(error)) from None
    if settings.log_format == "json":
        log_as_json()
    logging.getLogger().setLevel(settings.log_level.upper())
    for name in ("httpx", "httpcore", "uvicorn.error", "transformers", "huggingface_hub", "filelock", "watchfiles"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    return settings


def say(text: str) -> None:
    """Print a line with its control characters escaped: an adapter's text must not control the terminal."""
    print("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text))


def say_row(label: str, text: str) -> None:
    say(f"  {label:<{_LABEL_CHARS}}{text}")
