"""Calls that are JSON objects with a name and arguments: alone or in a list, between markers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.detokenizer import TextPiece
from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader
from server.text.tools.json_text import read_string, read_value
from server.text.tools.tool import MAX_FAILED_CALLS, CallGrammar, Tool

_NAME_KEYS = ("name", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type", "tool_call_id")


@dataclass(frozen=True)
class JsonCalls:
    """``{"name": ..., "arguments": {...}}``; without ``begin`` a call stands at the beginning of an answer.

    A model that writes a list where the format has single objects is understood, and the other way round.
    ``begins`` are other texts that introduce calls. ``in_list``: one pair of markers is around all calls.
    ``first_member`` is JSON text in an object before the name.
    """

    name: str
    begin: str
    end: str
    in_list: bool = False
    name_key: str = "name"
    arguments_key: str = "arguments"
    first_member: str = ""
    separator: str | None = "\n"
    begins: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(text.strip() for text in (self.begin, self.end, *self.begins) if text)

    @property
    def trigger(self) -> str:
        return self.begin.strip()

    @property
    def opening(self) -> str:
        return f"{self.begin}[" if self.in_list else ""

    @property
    def closing(self) -> str:
        return f"]{self.end}" if self.in_list else ""

    def grammar(self, tool: Tool) -> CallGrammar:
        before = f'{{{self.first_member}"{self.name_key}": "{tool.name}", "{self.arguments_key}": '
        arguments = tool.json_arguments()
        if self.in_list:
            return CallGrammar(before, arguments, "}")
        return CallGrammar(self.begin + before, arguments, "}" + self.end)

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        call = json.dumps({self.name_key: name, self.arguments_key: arguments}, ensure_ascii=False)
        call = f"{{{self.first_member}{call[1:]}"
        return call if self.in_list else f"{self.begin}{call}{self.end}"

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        begins = tuple(text.strip() for text in (self.begin, *self.begins) if text)
        if not self.begin:
            yield from self._read_unmarked(reader, writer)
        for _ in range(MAX_FAILED_CALLS if begins else 0):
            failed = yield from self._read_marked(reader, writer, begins)
            if not failed:
                return
        yield from reader.until((), writer.content)

    def _read_unmarked(self, reader: TextReader, writer: PartWriter) -> Steps[None]:
        """Calls at the beginning, one behind the other."""
        if (yield from reader.starts_with("{", "[")):
            reader.begin_attempt()
            yield from read_calls(reader, writer)
            reader.give_back()

    def _read_marked(self, reader: TextReader, writer: PartWriter, begins: Sequence[str]) -> Steps[bool]:
        """Text and calls; True behind a text that is a marker and no call, which was written as content."""
        while marker := (yield from reader.until(begins, writer.content)):
            reader.begin_attempt()
            reader.take_through(marker)
            yield from reader.skip_space()
            num_calls = writer.num_calls
            yield from read_calls(reader, writer)
            if writer.num_calls == num_calls:
                reader.give_back()
                writer.content(reader.take_rest() if reader.ended else reader.take_through(marker))
                return True
            reader.commit()
            yield from reader.skip_closing(self.end.strip())
            yield from _skip_space_before(reader, begins)
        return False


def read_calls(reader: TextReader, writer: PartWriter) -> Steps[None]:
    """Objects of calls one behind the other, or in lists, as many as there are.

    A text that is none is left, consumed in part, to ``give_back``.
    """
    while True:
        yield from reader.skip_space()
        if (yield from reader.skip("[", "]", ",", ";")):
            continue
        if not (yield from reader.starts_with("{")):
            return
        if not (yield from _CallObject(reader, writer).read()):
            return


def _skip_space_before(reader: TextReader, markers: Sequence[str]) -> Steps[None]:
    """Drop white space between calls, and at the end; that before more text stays."""
    while not reader.text.strip():
        if not (yield from reader.more()):
            reader.take_rest()
            return


class _CallObject:
    """One object. Its name is written as soon as it is known, and its arguments as they arrive."""

    def __init__(self, reader: TextReader, writer: PartWriter) -> None:
        self._reader, self._writer = reader, writer
        self._named = False
        self._has_arguments = False
        self._in_function = False
        self._held: list[TextPiece] = []  # arguments before the name

    def read(self) -> Steps[bool]:
        """Whether it is a whole object with a name."""
        whole = yield from self._members()
        if self._named and not self._has_arguments:
            self._writer.arguments(TextPiece("{}"))
        return whole and self._named

    def _members(self) -> Steps[bool]:
        reader = self._reader
        yield from reader.skip("{")
        while True:
            yield from reader.skip_space()
            if (yield from reader.skip("}")):
                return True
            key = yield from read_string(reader)
            yield from reader.skip_space()
            if key is None or not (yield from reader.skip(":")):
                return False
            yield from reader.skip_space()
            if not (yield from self._value(key)):
                return False
            yield from reader.skip_space()
            yield from reader.skip(",")

    def _value(self, key: str) -> Steps[bool]:
        if key in _NAME_KEYS and not self._named:
            return (yield from self._name())
        if key in _ARGUMENT_KEYS and not self._has_arguments:
            return (yield from self._arguments())
        if key == "function" and not self._in_function and (yield from self._reader.starts_with("{")):
            self._in_function = True
            return (yield from self._members())
        if not self._named and key not in _OTHER_KEYS:
            return False
        return (yield from read_value(self._reader, lambda piece: None))

    def _name(self) -> Steps[bool]:
        name = yield from read_string(self._reader)
        if not name:
            return False
        self._named = True
        self._reader.commit()
        self._writer.call(name)
        for piece in self._held:
            self._writer.arguments(piece)
        return True

    def _arguments(self) -> Steps[bool]:
        self._has_arguments = True
        emit = self._writer.arguments if self._named else self._held.append
        if (yield from self._reader.starts_with('"')):
            text = yield from read_string(self._reader)
            emit(TextPiece(text or "{}"))
            return text is not None
        if (yield from self._reader.skip("null")):
            emit(TextPiece("{}"))
            return True
        return (yield from read_value(self._reader, emit))
