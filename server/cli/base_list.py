"""``quickchange base list``: the bases that need no hub, and the configured one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from base_files.errors import BaseMalformed, BaseNotFound
from base_files.locate import base_on_disk
from base_files.names import EMBEDDED_BASE
from base_files.packaged import PACKAGED_BASES, PackagedBase
from server.cli.command_line import command_parser, parse_options, parse_settings, say, say_row

DESCRIPTION = """\
List the bases that need no hub: the embedded one, and those that `quickchange base get` fetches; then the base that
--base-model or QUICKCHANGE_BASE_MODEL names, if it is another. The exit status is 1 if the configured base is not on
this machine."""

_EMBEDDED = "embedded chat model of 11 million parameters, 2,048 tokens of context"


def main(arguments: Sequence[str]) -> int:
    _, rest = parse_options(command_parser("base list", DESCRIPTION), arguments)
    chosen = parse_settings("base list", rest).base_model
    names = dict.fromkeys([EMBEDDED_BASE, *PACKAGED_BASES, chosen])
    missing = {name for name in names if not _print_base(name, is_set=name == chosen)}
    return int(chosen in missing)


def _print_base(name: str, *, is_set: bool) -> bool:
    """Print what the base is, and where. False if it is not on this machine."""
    packaged = PACKAGED_BASES.get(name)
    say(f"{name}{' (configured)' if is_set else ''}")
    if name == EMBEDDED_BASE:
        say_row("what", f"{_EMBEDDED}; licence Apache-2.0")
    elif packaged is not None:
        say_row("what", f"{packaged.description}; licence {packaged.licence}")
    try:
        path, num_bytes = _place(name, packaged)
    except BaseNotFound as error:
        say_row("path", f"none: {error.reason}")
        return False
    except BaseMalformed as error:
        say_row("path", str(error))
        return False
    if path is None:
        say_row("path", "a hub id: it is downloaded into the hub's cache when it is first used")
        return True
    say_row("size", f"{num_bytes / 1e6:,.0f} MB")
    say_row("path", str(path))
    return True


def _place(name: str, packaged: PackagedBase | None) -> tuple[Path | None, int]:
    """Path and size in bytes of the weights; no path for a hub id. Raises ``BaseNotFound`` or ``BaseMalformed``."""
    if packaged is not None:
        return packaged.installed_path(), packaged.num_bytes
    source = base_on_disk(name)
    return (None, 0) if source is None else (source.path, source.num_weight_bytes)
