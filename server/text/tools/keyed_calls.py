"""Calls that are JSON objects with the name as their key: Apertus."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader
from server.text.tools.json_text import read_string, read_value
from server.text.tools.tool import MAX_FAILED_CALLS, CallGrammar, Tool


@dataclass(frozen=True)
class KeyedCalls:
    """``[{"name": {...}}, ...]`` between ``begin`` and ``end``."""

    name: str
    begin: str
    end: str
    separator = ", "

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end)

    @property
    def trigger(self) -> str:
        return self.begin

    @property
    def opening(self) -> str:
        return f"{self.begin}["

    @property
    def closing(self) -> str:
        return f"]{self.end}"

    def grammar(self, tool: Tool) -> CallGrammar:
        return CallGrammar(f'{{"{tool.name}": ', tool.json_arguments(), "}")

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        return json.dumps({name: arguments}, ensure_ascii=False)

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        for _ in range(MAX_FAILED_CALLS):
            if not (yield from reader.until((self.begin,), writer.content)):
                return
            reader.begin_attempt()
            reader.take_through(self.begin)
            num_calls = writer.num_calls
            yield from _read_objects(reader, writer)
            if writer.num_calls == num_calls:
                reader.give_back()
                writer.content(reader.take_rest() if reader.ended else reader.take_through(self.begin))
            reader.commit()
            yield from reader.skip_closing(self.end)
        yield from reader.until((), writer.content)


def _read_objects(reader: TextReader, writer: PartWriter) -> Steps[None]:
    """Objects of calls, as many as there are; other text is left, consumed in part."""
    while True:
        yield from reader.skip_space()
        if (yield from reader.skip("[", "]", ",", "{", "}")):
            continue
        name = yield from read_string(reader)
        yield from reader.skip_space()
        if not name or not (yield from reader.skip(":")):
            return
        reader.commit()
        writer.call(name)
        yield from reader.skip_space()
        yield from read_value(reader, writer.arguments)
