"""What a request says about a tool, and what a format of calls is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader

MAX_FAILED_CALLS = 8
"""Texts that look like the beginning of a call and are none, before the rest of an answer is taken as text."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class CallGrammar(NamedTuple):
    """One call: literal text before and behind ``arguments``, an expression of Lark."""

    before: str
    arguments: str
    behind: str


class ToolFormat(Protocol):
    """How a family of models writes calls.

    ``markers`` are texts that may be special tokens, which the parser has to see. A call in the middle of an answer
    begins with ``trigger``; with "", a call is possible only at the beginning. Several calls stand behind ``opening``,
    ``separator`` is between them, ``closing`` behind them. ``short_ids``: ids of calls have nine characters.
    """

    @property
    def name(self) -> str: ...
    @property
    def markers(self) -> tuple[str, ...]: ...
    @property
    def trigger(self) -> str: ...
    @property
    def opening(self) -> str: ...
    @property
    def separator(self) -> str: ...
    @property
    def closing(self) -> str: ...
    @property
    def short_ids(self) -> bool: ...

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        """Text and calls up to the end of the answer."""

    def grammar(self, tool: Tool) -> CallGrammar:
        """One call of ``tool``."""

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One call, as the model writes it."""
