"""``quickchange chat``: a conversation that can switch adapters, or one answer, on a running or temporary server."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from base_files.locate import base_on_disk
from server.cli.command_line import command_parser, parse_options, parse_settings
from server.cli.listening import bound_sockets
from server.errors import StartError
from server.settings import Settings

HELP = """\
/adapter NAME   switch to another adapter; the conversation is kept
/adapters       list the models
/new            start a new conversation
/help           show this help
/quit           quit (as does Ctrl-D); Ctrl-C stops an answer"""

_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)

DESCRIPTION = """\
Chat with the base or an adapter: interactively, or with one question (an argument, or standard input) for one answer.
Without --url, the server on --host and --port is used; if none answers there, a temporary one is started.
A server with API keys needs QUICKCHANGE_API_KEY or --api-key. SSL_CERT_FILE names the certificate of a server with one
of its own making."""


class ChatError(Exception):
    """The server cannot be reached or refused the request. The text is printed."""


def run_chat(url: str, model: str | None, question: str | None, *, api_key: str | None = None) -> int:
    """Chat with the server at ``url``, with an API key if it needs one; returns the exit status.

    With a question, as an argument or on standard input, only the answer goes to standard output.
    """
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read()
    try:
        if question is not None and not question.strip():
            raise ChatError("the question is empty")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        with httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT, headers=headers) as client:
            server = Server(client)
            session = ChatSession(server, model or server.models()[0])
            if question is None:
                session.run()
            else:
                _answer_once(session, question)
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@dataclass(frozen=True)
class Server:
    """The server's endpoints that the chat uses."""

    client: httpx.Client

    def models(self) -> list[str]:
        try:
            response = self.client.get("/v1/models")
            _raise_for_error(response)
            return [str(model["id"]) for model in response.json()["data"]]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ChatError(f"{self.client.base_url} does not answer: {error}") from error

    def answer(self, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {"model": model, "messages": messages, "stream": True}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                _raise_for_error(response)
                yield from _texts(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatError(f"the connection failed: {error}") from error


@dataclass
class ChatSession:
    """The messages so far, and the model that answers next."""

    server: Server
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        print(f"{self.model} - /help for help")
        while True:
            try:
                line = input(f"{self.model}> ").strip()
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                print()
                return
            if line == "/quit":
                return
            if line:
                self._handle(line)

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer's text; the question and the received part of the answer join the conversation."""
        messages = [*self.messages, {"role": "user", "content": question}]
        received: list[str] = []
        try:
            for text in self.server.answer(self.model, messages):
                received.append(text)
                yield text
        finally:
            if received:
                self.messages = [*messages, {"role": "assistant", "content": "".join(received)}]

    def _handle(self, line: str) -> None:
        """Handle one line of input. An error is printed and does not end the conversation."""
        try:
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            else:
                self._print_answer(line)
        except ChatError as error:
            print(f"error: {error}", file=sys.stderr)

    def _command(self, name: str, argument: str | None = None) -> None:
        match name, argument:
            case "/adapter", str(adapter):
                self._switch(adapter)
            case "/adapters", None:
                for model in self.server.models():
                    print(f"{'*' if model == self.model else ' '} {model}")
            case "/new", None:
                self.messages = []
            case _:
                print(HELP)

    def _switch(self, adapter: str) -> None:
        known = self.server.models()
        if adapter not in known:
            raise ChatError(f"there is no model {adapter!r}; available: {', '.join(known)}")
        self.model = adapter

    def _print_answer(self, question: str) -> None:
        """Closing the generator closes the connection, which stops the server's generation."""
        answer = self.ask(question)
        try:
            for text in answer:
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            answer.close()
            print()


def _answer_once(session: ChatSession, question: str) -> None:
    for text in session.ask(question):
        print(text, end="", flush=True)
    print()


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """The text of a stream's events. Raises ``ChatError`` for an error event, or if ``[DONE]`` is missing."""
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text
    raise ChatError("the server ended the stream early")


def _raise_for_error(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = f"HTTP {response.status_code}"
    if response.status_code == 401:
        message += " The chat takes it from QUICKCHANGE_API_KEY."
    raise ChatError(message)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("chat", DESCRIPTION)
    parser.add_argument("--adapter", metavar="NAME", help="adapter that answers (default: the base)")
    parser.add_argument("--url", help="a running server, for example http://127.0.0.1:8000")
    parser.add_argument("question", nargs="?", help="one question (default: a conversation)")
    options, rest = parse_options(parser, arguments)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = parse_settings("chat", rest)
    url = options.url or _url_of(settings)
    if options.url is not None or _answers(url):
        api_key = None if settings.api_key is None else settings.api_key.get_secret_value()
        return run_chat(url, options.adapter, options.question, api_key=api_key)
    with _local_server(settings) as local:
        return run_chat(local, options.adapter, options.question)


def _url_of(settings: Settings) -> str:
    """That of the server with these settings. A server on all addresses is on loopback too."""
    host = _LOOPBACK_OF.get(settings.host, settings.host)
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _answers(url: str) -> bool:
    """Whether a healthy Quickchange server is there."""
    try:
        response = httpx.get(f"{url}/health", timeout=1.0)
        return response.status_code == 200 and response.json().get("status") == "ok"
    except (httpx.HTTPError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _local_server(settings: Settings) -> Iterator[str]:
    """Run a server on a free loopback port in a thread of this process; it logs only warnings."""
    logging.getLogger().setLevel(logging.WARNING)
    base_on_disk(settings.base_model)
    print("no server is running; starting a temporary one ...", file=sys.stderr)
    import uvicorn  # with torch takes seconds, which a chat with a running server need not wait

    from server.api.auth.access import Access
    from server.cli.serve import build, uvicorn_config

    with bound_sockets("127.0.0.1", 0) as sockets:
        plain = settings.model_copy(update={"ssl_certfile": None, "ssl_keyfile": None})
        server = uvicorn.Server(uvicorn_config(build(plain, Access())))
        thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise StartError("the temporary server did not start; `quickchange serve` shows why")
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
