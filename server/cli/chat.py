"""Talking to a running server in a terminal: a conversation in which the adapter may change, or one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

HELP = """\
/adapter NAME   go on with another adapter; the conversation so far is kept
/adapters       list what there is
/new            forget the conversation
/help           this
/quit           leave (as does Ctrl-D); Ctrl-C stops an answer"""

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ChatError(Exception):
    """The server could not be asked, or said no; the text is for the person at the terminal."""


def run_chat(url: str, model: str | None, question: str | None) -> int:
    """Chat with the server at ``url``, and return the exit code.

    With a question, or with one piped in, the answer is all that is written to standard output.
    """
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read()
    try:
        if question is not None and not question.strip():
            raise ChatError("the question is empty")
        with httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT) as client:
            server = Server(client)
            talk = Conversation(server, model or server.models()[0])
            if question is None:
                talk.run()
            else:
                _answer_once(talk, question)
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@dataclass(frozen=True)
class Server:
    """What the terminal asks of the server."""

    client: httpx.Client

    def models(self) -> list[str]:
        try:
            response = self.client.get("/v1/models")
            _raise_for_error(response)
            return [str(model["id"]) for model in response.json()["data"]]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ChatError(f"no answer from {self.client.base_url}: {error}") from error

    def answer(self, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {"model": model, "messages": messages, "stream": True}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                _raise_for_error(response)
                yield from _texts(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatError(f"the connection broke: {error}") from error


@dataclass
class Conversation:
    """The turns so far, and who answers next."""

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
                self._take(line)

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer's text as it comes; question and answer join the conversation, however much of it was heard."""
        asked = [*self.messages, {"role": "user", "content": question}]
        heard: list[str] = []
        try:
            for text in self.server.answer(self.model, asked):
                heard.append(text)
                yield text
        finally:
            if heard:
                self.messages = [*asked, {"role": "assistant", "content": "".join(heard)}]

    def _take(self, line: str) -> None:
        """One line of input. What goes wrong is said, and does not end the conversation."""
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
                print("\n".join(f"{'*' if each == self.model else ' '} {each}" for each in self.server.models()))
            case "/new", None:
                self.messages = []
            case _:
                print(HELP)

    def _switch(self, adapter: str) -> None:
        known = self.server.models()
        if adapter not in known:
            raise ChatError(f"there is no {adapter!r}; there are {', '.join(known)}")
        self.model = adapter

    def _print_answer(self, question: str) -> None:
        """Leaving the loop closes the connection, on which the server stops."""
        answer = self.ask(question)
        try:
            for text in answer:
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            answer.close()
            print()


def _answer_once(talk: Conversation, question: str) -> None:
    for text in talk.ask(question):
        print(text, end="", flush=True)
    print()


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """The text in the events of a stream. Raises ``ChatError`` for an error event, or if ``[DONE]`` is missing."""
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
    raise ChatError("the server broke off")


def _raise_for_error(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = f"HTTP {response.status_code}"
    raise ChatError(message)
