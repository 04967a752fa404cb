"""Calls whose arguments stand in elements, one for each, as plain text: Qwen 3 Coder and Seed-OSS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.detokenizer import TextPiece
from server.text.grammar.grammar import Grammar, choice, concatenate, json_schema, literal, one_of, triggered
from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader
from server.text.tools.named_calls import MAX_NAME_LENGTH
from server.text.tools.tool import MAX_FAILED_CALLS, CallGrammar, Tool

MAX_VALUE_LENGTH = 1_000_000


@dataclass(frozen=True)
class XmlCalls:
    """``<function=name>`` with a ``<parameter=key>`` for each argument, between ``begin`` and ``end``.

    ``line_break`` stands around values. A string is written as it is, any other value as JSON.
    """

    name: str
    begin: str
    end: str
    line_break: str
    opening = closing = ""
    separator = "\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end)

    @property
    def trigger(self) -> str:
        return self.begin

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        values = "".join(self._element(key, value) for key, value in arguments.items())
        return f"{self.begin}\n<function={name}>\n{values}</function>\n{self.end}"

    def _element(self, key: str, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return f"<parameter={key}>{self.line_break}{text}{self.line_break}</parameter>\n"

    def grammar(self, tool: Tool) -> CallGrammar:
        tool.check_arguments()
        elements = []
        for key, schema in tool.argument_schemas().items():
            element = self._element_grammar(tool, key, schema)
            elements.append(element if tool.requires(key) else one_of([element, literal("")]))
        before = f"{self.begin}\n<function={tool.name}>\n"
        return CallGrammar(before, concatenate(*elements), f"</function>\n{self.end}")

    def _element_grammar(self, tool: Tool, key: str, schema: Any) -> Grammar:
        before = literal(f"<parameter={key}>{self.line_break}")
        end = f"{self.line_break}</parameter>\n"
        if not _is_string(schema):
            return concatenate(before, json_schema(schema, tool.source, lenient=not tool.strict), literal(end))
        texts = [schema["const"]] if "const" in schema else schema.get("enum")
        if texts:
            return concatenate(before, choice(texts, tool.source), literal(end))
        return concatenate(before, triggered([(end, literal(""))], least=1, most=1))

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        schemas = {tool.name: tool.argument_schemas() for tool in tools}
        num_failed = 0
        while marker := (yield from reader.until((self.begin, "<function="), writer.content)):
            reader.begin_attempt()
            if marker == self.begin:
                reader.take_through(marker)
            yield from reader.skip_space()
            if not (yield from self._read_call(reader, writer, schemas)):
                reader.give_back()
                num_failed += 1
                ends = reader.ended or num_failed >= MAX_FAILED_CALLS
                writer.content(reader.take_rest() if ends else reader.take_through(marker))
            reader.commit()
        yield from reader.until((), writer.content)

    def _read_call(
        self, reader: TextReader, writer: PartWriter, schemas: Mapping[str, Mapping[str, Any]]
    ) -> Steps[bool]:
        if not (yield from reader.skip("<function=")):
            return False
        name = yield from reader.read_until(">", limit=MAX_NAME_LENGTH)
        if not name:
            return False
        reader.commit()
        writer.call(name)
        writer.arguments(TextPiece("{"))
        if not (yield from self._read_arguments(reader, writer, schemas.get(name, {}))):
            reader.take_rest()  # the answer was cut inside of an argument
            return True
        writer.arguments(TextPiece("}"))
        yield from reader.skip_closing("</function>")
        yield from reader.skip_space()
        yield from reader.skip_closing(self.end)
        return True

    def _read_arguments(self, reader: TextReader, writer: PartWriter, schemas: Mapping[str, Any]) -> Steps[bool]:
        """Write the arguments; False if the text ends inside of one."""
        comma = ""
        while True:
            yield from reader.skip_space()
            if not (yield from reader.skip("<parameter=")):
                return not reader.ended or bool(reader.text)
            key = yield from reader.read_until(">", limit=MAX_NAME_LENGTH)
            text = yield from reader.read_until("</parameter>", limit=MAX_VALUE_LENGTH)
            if key is None or text is None:
                return False
            value = _value(text.removeprefix("\n").removesuffix("\n"), schemas.get(key))
            writer.arguments(TextPiece(f"{comma}{json.dumps(key, ensure_ascii=False)}: {value}"))
            comma = ", "


def _is_string(schema: Any) -> bool:
    """Whether every value is a string, which is then written without quotes."""
    if not isinstance(schema, Mapping) or schema.get("type", "string") != "string":
        return False
    texts = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not isinstance(texts, list):
        return False
    return all(isinstance(text, str) for text in texts) and ("type" in schema or bool(texts))


def _value(text: str, schema: Any) -> str:
    """The JSON text of a value: a string by its schema, or else whatever it is."""
    if not _is_string(schema):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        return text.strip()
    return json.dumps(text, ensure_ascii=False)
