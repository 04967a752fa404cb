"""``quickchange chat``: against a running server, or against one that lives as long as the talk."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import httpx

from base_files.locate import base_on_disk
from server.cli.chat import run_chat
from server.cli.options import command_parser, parse_options
from server.cli.serve_command import bind
from server.cli.settings import parse_settings
from server.errors import StartError
from server.settings import Settings

DESCRIPTION = """\
Talk to the base or to an adapter: interactively, or with one question (as an argument, or piped in) for one answer.
Without --url it uses the server on --host and --port if one answers there, else it starts one for the talk."""


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("chat", DESCRIPTION)
    parser.add_argument("--adapter", metavar="NAME", help="who answers; without it, the base")
    parser.add_argument("--url", help="a running server, for example http://127.0.0.1:8000")
    parser.add_argument("question", nargs="?", help="one question; without it, a conversation")
    options, rest = parse_options(parser, arguments)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.url is not None:
        return run_chat(options.url, options.adapter, options.question)
    settings = parse_settings("chat", rest)
    url = f"http://{settings.host}:{settings.port}"
    if _answers(url):
        return run_chat(url, options.adapter, options.question)
    with _local_server(settings) as local:
        return run_chat(local, options.adapter, options.question)


def _answers(url: str) -> bool:
    """Whether a server of ours, in good health, is there."""
    try:
        response = httpx.get(f"{url}/health", timeout=1.0)
        return response.status_code == 200 and response.json().get("status") == "ok"
    except (httpx.HTTPError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _local_server(settings: Settings) -> Iterator[str]:
    """A server on a free loopback port, in a thread of this process; only warnings are logged."""
    logging.getLogger().setLevel(logging.WARNING)
    base_on_disk(settings.base_model)
    print("no server is running; loading the base ...", file=sys.stderr)
    import uvicorn  # and torch: seconds, which a talk with another process need not wait

    from server.cli.serve import build, uvicorn_config

    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(build(settings)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise StartError("the server for this talk did not start; try `quickchange serve` to see why")
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
