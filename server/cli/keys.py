"""``quickchange keys``: makes API keys. The key itself is printed once and stored nowhere."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence

from server.api.auth.key_file import LABEL, LABEL_RULE, MAX_LIMIT, RESERVED_LABELS
from server.api.auth.keys import digest_of
from server.api.auth.principal import AccessScope

MIN_KEY_CHARS = 32
_PREFIX = "qc-"
_RANDOM_BYTES = 32

USAGE = """\
usage: quickchange keys new LABEL [--scope SCOPE ...]   make an API key and print its entry for --api-keys (see --help)
"""

DESCRIPTION = """\
Make an API key. Its entry for the key file goes to standard output, the key itself, once, to standard error:

    quickchange keys new web-shop --adapter helpdesk >> keys.toml
    quickchange serve --api-keys keys.toml

The file has digests only. A running server reads it again when it gets SIGHUP."""


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command; the exit status is 2 for an unknown one."""
    given = list(arguments)
    if given[:1] in (["help"], ["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    if given[:1] != ["new"]:
        name = repr(given[0]) if given else "without a name"
        print(f"quickchange keys: there is no command {name}\n{USAGE}", file=sys.stderr, end="")
        return 2
    return new(given[1:])


def new(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    key = sys.stdin.readline().strip() if options.stdin else _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    problem = _problem(options, key)
    if problem is not None:
        print(f"quickchange: {problem}", file=sys.stderr)
        return 1
    print(entry_of(options, key), flush=True)
    if not options.stdin:
        print(f"The key of {options.label}, which is shown only now:\n{key}", file=sys.stderr)
    return 0


def entry_of(options: argparse.Namespace, key: str) -> str:
    """The entry of the key file."""
    label = f'"{options.label}"' if "." in options.label else options.label
    scopes = dict.fromkeys(options.scope or [AccessScope.INFER.value])
    lines = [f"[{label}]", f'sha256 = "{digest_of(key).hex()}"', f"scopes = {_list(scopes)}"]
    if options.adapter:
        lines.append(f"adapters = {_list(dict.fromkeys(options.adapter))}")
    for name in ("requests_per_minute", "max_concurrent"):
        value = getattr(options, name)
        if value is not None:
            lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"


def _list(texts: dict[str, None]) -> str:
    return "[" + ", ".join(f'"{text}"' for text in texts) + "]"


def _problem(options: argparse.Namespace, key: str) -> str | None:
    """What is wrong with the options, if anything. The key is not repeated."""
    if LABEL.fullmatch(options.label) is None or options.label in RESERVED_LABELS:
        return f"{options.label!r:.80} is no label: use {LABEL_RULE}"
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable():
        return f"a key has {MIN_KEY_CHARS} characters or more, all of them printable ASCII"
    if options.adapter and AccessScope.ADMIN.value in (options.scope or ()):
        return "--adapter and --scope admin: an admin changes every adapter, so give one of them"
    wrong = next((name for name in options.adapter or () if not LABEL.fullmatch(name)), None)
    return None if wrong is None else f"--adapter {wrong!r:.80} is no adapter's name"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quickchange keys new",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("label", metavar="LABEL", help="name of the key in logs, metrics and the file")
    scopes = [scope.value for scope in AccessScope]
    parser.add_argument(
        "--scope", action="append", choices=scopes, help="what the key opens, repeatable (default: infer)"
    )
    parser.add_argument(
        "--adapter", action="append", metavar="NAME", help="the only adapters that exist for it, repeatable"
    )
    parser.add_argument("--requests-per-minute", type=_whole, metavar="N", help="default: no limit")
    parser.add_argument("--max-concurrent", type=_whole, metavar="N", help="requests at a time; default: no limit")
    parser.add_argument("--stdin", action="store_true", help="take an existing key, a line of standard input")
    return parser


def _whole(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= number <= MAX_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no whole number from 1 to {MAX_LIMIT:,}")
    return number
