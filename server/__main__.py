"""``python -m server`` and the console script ``quickchange``: serve (the default), chat, adapters, keys,
base, train.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from base_files.errors import BaseFilesError
from cpu_kernels.spinning import limit_spinning
from server.errors import StartError
from server.logs import configure_logging

USAGE = """\
usage: quickchange [serve] [--SETTING VALUE ...]            serve the base and its adapters (--help lists the settings)
       quickchange chat [--adapter NAME] ["one question"]   chat with a running or a temporary server
       quickchange adapters [list|check|pin|unpin|rollback|add|convert]
                                                            list, check and manage adapters (--help explains each)
       quickchange keys new LABEL                           make an API key (--help explains)
       quickchange base [list|get]                          list and fetch base models that need no hub
       quickchange train RECIPE.yaml [...]                  train an adapter (the same as python -m trainer train)
"""


def serve(arguments: Sequence[str]) -> int:
    from server.cli.serve_command import main

    return main(arguments)


def chat(arguments: Sequence[str]) -> int:
    from server.cli.chat import main

    return main(arguments)


def adapters(arguments: Sequence[str]) -> int:
    from server.cli.adapters import main

    return main(arguments)


def keys(arguments: Sequence[str]) -> int:
    from server.cli.keys import main

    return main(arguments)


def base(arguments: Sequence[str]) -> int:
    from server.cli.base import main

    return main(arguments)


def train(arguments: Sequence[str]) -> int:
    """Replace this process by the trainer: server and trainer do not import each other."""
    os.execv(sys.executable, [sys.executable, "-m", "trainer", "train", *arguments])


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "chat": chat,
    "adapters": adapters,
    "keys": keys,
    "base": base,
    "train": train,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for a failure, 2 for bad usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        print(USAGE, end="")
        return 0
    name = given.pop(0) if given and not given[0].startswith("-") else "serve"
    if name not in COMMANDS:
        print(f"quickchange: there is no command {name!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    configure_logging()
    limit_spinning()
    try:
        return COMMANDS[name](given)
    except (StartError, BaseFilesError) as error:
        print(f"quickchange: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell has it for SIGINT


if __name__ == "__main__":
    sys.exit(main())
