"""``quickchange adapters``: sub-commands that list, check and manage adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

USAGE = """\
usage: quickchange adapters [list] [--SETTING VALUE ...]   list adapters: status, reason of a refusal, pins, versions
       quickchange adapters check DIR|NAME [--no-probe]    report on one adapter and compare its logits with PEFT's
       quickchange adapters add REPO_ID[@REVISION]         download an adapter from the Hugging Face hub
       quickchange adapters convert SOURCE                 convert from mlx-lm, GGUF, Ollama or another PEFT tuner
       quickchange adapters pin NAME[@VERSION]             keep an adapter in memory, or pin its name to a kept version
       quickchange adapters unpin NAME                     remove the pin: the name follows its folder again
       quickchange adapters rollback NAME                  pin the name to the previous version

Each command takes --help and every setting of `quickchange serve`. Settings may precede the command.
VERSION is a prefix of a version's digest.
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
"""Module and function of each command. They are imported on demand: some import torch or huggingface_hub."""


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command (default: ``list``); the exit status is 2 for an unknown one."""
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
    """The arguments with the settings that precede the command moved behind it."""
    given = list(arguments)
    if not given or not given[0].startswith("--"):
        return given
    from server.cli.command_line import bind_values

    bound = bind_values(given)
    at = next((index for index, argument in enumerate(bound) if not argument.startswith("-")), None)
    if at is None or bound[at] not in COMMANDS:
        return given
    return [bound[at], *bound[:at], *bound[at + 1 :]]
