"""Calls whose name stands before their arguments, which are a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader
from server.text.tools.json_calls import read_calls
from server.text.tools.json_text import read_value
from server.text.tools.tool import MAX_FAILED_CALLS, CallGrammar, Tool

MAX_NAME_LENGTH = 128


@dataclass(frozen=True)
class NamedCalls:
    """``begin``, the name, ``middle``, the arguments, ``end``.

    Without ``begin`` a call stands at the beginning of an answer, and its name has to be that of a tool. ``marker`` is
    the part of ``begin`` that introduces a call. ``name_ends`` are other texts behind a name, up to ``middle``.
    ``ignored`` are texts between calls.
    """

    name: str
    begin: str
    middle: str
    end: str
    marker: str = ""
    opening: str = ""
    closing: str = ""
    separator: str | None = "\n"
    name_ends: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        texts = (self.marker, self.middle.strip(), *self.name_ends, self.end.strip("\n`"), *self.ignored)
        return tuple(text for text in texts if text)

    @property
    def trigger(self) -> str:
        return self.opening or self.marker

    def grammar(self, tool: Tool) -> CallGrammar:
        return CallGrammar(self.begin + tool.name + self.middle, tool.json_arguments(), self.end)

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{self.begin}{name}{self.middle}{json.dumps(arguments, ensure_ascii=False)}{self.end}"

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        if not self.marker:
            yield from self._read_unmarked(reader, writer, tools)
        for _ in range(MAX_FAILED_CALLS if self.marker else 0):
            failed = yield from self._read_marked(reader, writer)
            if not failed:
                return
        yield from reader.until((), writer.content)

    def _read_unmarked(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        """Calls at the beginning, one behind the other."""
        begins = [tool.name + self.middle for tool in tools]
        while True:
            if writer.num_calls:
                yield from reader.skip_space()
            begin = yield from reader.starts_with(*begins)
            if not begin:
                return
            reader.take(len(begin))
            writer.call(begin.removesuffix(self.middle))
            yield from reader.skip_space()
            yield from read_value(reader, writer.arguments)

    def _read_marked(self, reader: TextReader, writer: PartWriter) -> Steps[bool]:
        """Text and calls; True behind a text that is a marker and no call, which was written as content."""
        while found := (yield from reader.until((self.marker, *self.ignored), writer.content)):
            if found != self.marker:
                reader.take_through(found)
                continue
            reader.begin_attempt()
            reader.take_through(found)
            if not (yield from self._read_call(reader, writer)):
                reader.give_back()
                writer.content(reader.take_rest() if reader.ended else reader.take_through(found))
                return True
            reader.commit()
        return False

    def _read_call(self, reader: TextReader, writer: PartWriter) -> Steps[bool]:
        """The rest of a call behind its marker; whether it is one."""
        yield from reader.skip_space()
        if (yield from reader.starts_with("{", "[{", "[ {")):
            num_calls = writer.num_calls
            yield from read_calls(reader, writer)
            return writer.num_calls > num_calls
        if prefix := self.begin.partition(self.marker)[2]:
            yield from reader.skip(prefix)
        name = yield from self._read_name(reader)
        if not name:
            return False
        reader.commit()
        writer.call(name)
        yield from reader.skip_space()
        yield from read_value(reader, writer.arguments)
        yield from reader.skip_space()
        yield from reader.skip_closing(self.end.strip())
        return True

    def _read_name(self, reader: TextReader) -> Steps[str | None]:
        text = yield from reader.read_until(self.middle, limit=MAX_NAME_LENGTH)
        for end in self.name_ends:
            text = None if text is None else text.partition(end)[0]
        return None if text is None else text.strip()
