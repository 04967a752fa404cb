"""Calls in Python's syntax: OLMo 3."""

from __future__ import annotations

import ast
import json
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.grammar.grammar import Grammar, concatenate, json_schema, literal, one_of
from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader
from server.text.tools.tool import MAX_FAILED_CALLS, CallGrammar, Tool

MAX_LENGTH = 65_536
"""Most characters of the calls of an answer."""
_JSON_NAMES = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class PythonCalls:
    """``name(key=value, ...)`` on lines of their own between ``opening`` and ``closing``; values are JSON."""

    name: str
    begin: str
    end: str
    separator = "\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end)

    @property
    def trigger(self) -> str:
        return self.begin

    @property
    def opening(self) -> str:
        return f"{self.begin}\n"

    @property
    def closing(self) -> str:
        return f"\n{self.end}"

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        pairs = []
        for key, value in arguments.items():
            before, behind = _around_value(key)
            pairs.append(f"{before}{json.dumps(value, ensure_ascii=False)}{behind}")
        return f"{name}({', '.join(pairs)})"

    def grammar(self, tool: Tool) -> CallGrammar:
        tool.check_arguments()
        pairs = {}
        for key, schema in tool.argument_schemas().items():
            before, behind = _around_value(key)
            value = json_schema(schema, tool.source, lenient=not tool.strict)
            pairs[key] = concatenate(literal(before), value, literal(behind))
        needed = [pair for key, pair in pairs.items() if tool.requires(key)]
        optional = [pair for key, pair in pairs.items() if not tool.requires(key)]
        return CallGrammar(f"{tool.name}(", _arguments(needed, optional), ")")

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        num_failed = 0
        while num_failed < MAX_FAILED_CALLS and (yield from reader.until((self.begin,), writer.content)):
            reader.begin_attempt()
            reader.take_through(self.begin)
            text = yield from reader.read_until(self.end, limit=MAX_LENGTH)
            calls = None if text is None else parse_calls(text)
            if not calls:
                reader.give_back()
                writer.content(reader.take_rest() if text is None else reader.take_through(self.begin))
                num_failed += 1
                continue
            reader.commit()
            for name, arguments in calls:
                writer.whole_call(name, arguments)
        yield from reader.until((), writer.content)


def _around_value(key: str) -> tuple[str, str]:
    """Text before and behind the value of an argument; its key may be no name of Python's."""
    if key.isidentifier() and not keyword.iskeyword(key):
        return f"{key}=", ""
    return f"**{{{json.dumps(key, ensure_ascii=False)}: ", "}"


def _arguments(needed: Sequence[Grammar], optional: Sequence[Grammar]) -> Grammar:
    """Arguments in order, with commas between those that are there."""
    comma = literal(", ")
    later = [one_of([concatenate(comma, pair), literal("")]) for pair in optional]
    if needed:
        return concatenate(needed[0], *(part for pair in needed[1:] for part in (comma, pair)), *later)
    firsts = [concatenate(pair, *later[place + 1 :]) for place, pair in enumerate(optional)]
    return one_of([*firsts, literal("")])


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of calls, one behind the other or in a list; None if the text is anything else."""
    try:
        statements = ast.parse(text.strip()).body
        expressions = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
        if len(expressions) != len(statements):
            return None
        calls = [item for found in expressions for item in (found.elts if isinstance(found, ast.List) else [found])]
        return [_call(call) for call in calls]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    arguments: dict[str, Any] = {}
    for given in node.keywords:
        value = _literal(given.value)
        arguments |= value if given.arg is None and isinstance(value, dict) else {str(given.arg): value}
    return ast.unparse(node.func), arguments


def _literal(node: ast.expr) -> Any:
    """A value of JSON, written in JSON or in Python."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(key)): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    value = ast.literal_eval(node)
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError("no value of JSON")
    return value
