"""``quickchange adapters``: what an operator does with adapters from a terminal, one sub-command each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

USAGE = """\
usage: quickchange adapters [list] [--SETTING VALUE ...]   every adapter: served or not and why, pins, kept versions
       quickchange adapters check DIR|NAME [--no-probe]    everything about one, and whether it answers as under PEFT
       quickchange adapters add REPO_ID[@REVISION]         fetch one from the Hugging Face hub
       quickchange adapters convert SOURCE                 write one of mlx-lm, GGUF, Ollama or another tuner as LoRA
       quickchange adapters pin NAME[@VERSION]             keep one in memory, or hold its name at a kept version
       quickchange adapters unpin NAME                     let a name follow its folder again
       quickchange adapters rollback NAME                  hold a name at the version before

Each takes --help, and every setting of `quickchange serve`, before the name of the command or after
it. VERSION is the beginning of a version's digest.
"""


COMMANDS = {
    "list": ("server.cli.adapters_list", "main"),
    "check": ("server.cli.adapters_check", "main"),
    "add": ("server.cli.adapters_add", "main"),
    "convert": ("server.cli.convert.command", "main"),
    "pin": ("server.cli.adapters_pins", "run_pin"),
    "unpin": ("server.cli.adapters_pins", "run_unpin"),
    "rollback": ("server.cli.adapters_pins", "run_rollback"),
}
"""The module and function of each, imported when it is asked for: some need torch, or huggingface_hub."""


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command, ``list`` where none is named; the exit status is 2 for one that there is not."""
    given = _with_command_first(arguments)
    if given[:1] in (["help"], ["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    name = given.pop(0) if given and not given[0].startswith("-") else "list"
    if name not in COMMANDS:
        print(f"quickchange adapters: there is no command {name!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    module, function = COMMANDS[name]
    return int(getattr(import_module(module), function)(given))


def _with_command_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the settings that stand before the command's name put behind it."""
    given = list(arguments)
    if not given or not given[0].startswith("--"):
        return given
    from server.cli.command_line import bind_values

    bound = bind_values(given)
    at = next((index for index, argument in enumerate(bound) if not argument.startswith("-")), None)
    if at is None or bound[at] not in COMMANDS:
        return given
    return [bound[at], *bound[:at], *bound[at + 1 :]]
