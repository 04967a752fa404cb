"""Settings from the command line: a flag for every field, over the environment, over ``.env``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import SettingsError as UnreadableSettings

from server.errors import SettingsError
from server.settings import Settings


def parse_settings(command: str, arguments: Sequence[str]) -> Settings:
    """The settings of a command. Raises ``SettingsError`` that names field, value and the way out."""
    try:
        settings = Settings(
            _cli_parse_args=list(arguments),
            _cli_prog_name=f"quickchange {command}",
            _cli_kebab_case="all",
            _cli_implicit_flags=True,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        value = "hidden here" if "key" in field else repr(first["input"])
        raise SettingsError(
            f"setting {field} (--{field.replace('_', '-')} or QUICKCHANGE_{field.upper()}) is {value}: {first['msg']}"
        ) from None
    except UnreadableSettings as error:
        raise SettingsError(str(error)) from None
    logging.getLogger().setLevel(settings.log_level.upper())
    for name in ("httpx", "httpcore", "uvicorn.error", "transformers", "huggingface_hub", "filelock", "watchfiles"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    sys.stdout.reconfigure(line_buffering=True) if hasattr(sys.stdout, "reconfigure") else None
    return settings
