"""Ollama's TEMPLATE, where it is simple, as a chat template in Jinja.

Ollama plays a template without ``.Messages`` once for each turn, of a system text, a prompt and a response, and the
last time only as far as ``.Response`` (template/template.go). What is read of Go's language is text with trimmed space,
those three fields, comments, and ``if``, ``else if``, ``else`` over ``and``, ``or``, ``not``. The rest is not guessed.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r"\(|\)|\.?[A-Za-z]+")
_FIELDS = {".System": "system", ".Prompt": "prompt", ".Response": "response"}
_MAX_DEPTH = 20
_SPACE = " \t\r\n"
"""What Go trims (text/template/parse, ``spaceChars``); an ideographic or a hard space stays."""

_DRIVER = """\
{%- if tools -%}{{ raise_exception('This chat template has no place for tools') }}{%- endif -%}
{%- macro turn(system, prompt, response) -%}TURN{%- endmacro -%}
{%- macro last(system, prompt, response) -%}LAST{%- endmacro -%}
{%- set ns = namespace(system='', prompt='', response='', role='') -%}
BEGIN
{%- for message in messages -%}
{%- set same = ns.role == message['role'] -%}
{%- set content = message['content'] or '' -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{ raise_exception('This chat template has no place for the role ' ~ message['role']) }}
{%- endif -%}
{%- set before_system = message['role'] == 'system' and (ns.prompt or ns.response) -%}
{%- if before_system or (message['role'] == 'user' and ns.response) -%}
{{ turn(ns.system, ns.prompt, ns.response) }}
{%- set ns.system = '' -%}{%- set ns.prompt = '' -%}{%- set ns.response = '' -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = (ns.system ~ '\\n\\n' if same else '') ~ content -%}
{%- elif message['role'] == 'user' -%}
{%- set ns.prompt = (ns.prompt ~ '\\n\\n' if same else '') ~ content -%}
{%- else -%}
{%- set ns.response = (ns.response ~ '\\n\\n' if same else '') ~ content -%}
{%- endif -%}
{%- set ns.role = message['role'] -%}
{%- endfor -%}
{{ last(ns.system, ns.prompt, ns.response) }}"""
"""Turns as Ollama makes them of messages; consecutive ones of a role are one."""


@dataclass(frozen=True)
class Text:
    """Text as it stands."""

    text: str


@dataclass(frozen=True)
class Field:
    """The value of one of the three fields, by Jinja's name for it."""

    name: str


@dataclass(frozen=True)
class Branch:
    """``if``: a condition in Jinja, and what stands behind it and behind ``else``."""

    condition: str
    body: Sequence[Node]
    otherwise: Sequence[Node]


Node = Text | Field | Branch


def translate(template: str, *, begin: str = "") -> str:
    """A chat template in Jinja that renders what Ollama does, behind ``begin``.

    Raises ``ValueError`` that names what is not read.
    """
    nodes = _parse(_split(template))
    if not _has_response(nodes):
        nodes = [*nodes, Field("response")]  # as Ollama does
    last, _ = _cut(nodes)
    parts = {"TURN": _jinja(nodes), "LAST": _jinja(last), "BEGIN": _jinja([Text(begin)])}
    return re.sub("TURN|LAST|BEGIN", lambda match: parts[match[0]], _DRIVER)


def _split(template: str) -> deque[Text | str]:
    """Text and actions in turn, with the space gone that actions trim."""
    pieces: deque[Text | str] = deque()
    position, trims = 0, False
    while (start := template.find("{{", position)) >= 0:
        end = template.find("}}", start)
        if end < 0:
            raise ValueError(f"{template[start : start + 60]!r} is not closed")
        action = template[start + 2 : end]
        trims_left = action[:1] == "-" and action[1:2] in tuple(_SPACE)
        trims_right = action[-1:] == "-" and action[-2:-1] in tuple(_SPACE)
        text = template[position:start]
        text = text.lstrip(_SPACE) if trims else text
        pieces.append(Text(text.rstrip(_SPACE) if trims_left else text))
        action = action[1 if trims_left else 0 : -1 if trims_right else None].strip()
        if not (action.startswith("/*") and action.endswith("*/")):
            pieces.append(action)
        position, trims = end + 2, trims_right
    rest = template[position:]
    pieces.append(Text(rest.lstrip(_SPACE) if trims else rest))
    return pieces


def _parse(pieces: deque[Text | str]) -> list[Node]:
    nodes, end = _parse_list(pieces, 0)
    if end:
        raise ValueError(f"{{{{ {end:.60} }}}} belongs to no if")
    return nodes


def _parse_list(rest: deque[Text | str], depth: int) -> tuple[list[Node], str]:
    """Nodes up to the action that ends a branch, and that action; they are taken from the front."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"ifs are nested more than {_MAX_DEPTH} times")
    nodes: list[Node] = []
    while rest:
        piece = rest.popleft()
        if isinstance(piece, Text):
            nodes.append(piece)
        elif piece == "end" or piece.split()[:1] == ["else"]:
            return nodes, piece
        elif piece in _FIELDS:
            nodes.append(Field(_FIELDS[piece]))
        elif piece.startswith("if "):
            nodes.append(_parse_if(piece[3:], rest, depth + 1))
        else:
            raise ValueError(f"{{{{ {piece:.60} }}}} is not read")
    return nodes, ""


def _parse_if(condition: str, rest: deque[Text | str], depth: int) -> Branch:
    body, end = _parse_list(rest, depth)
    otherwise: list[Node] = []
    if end.startswith("else if "):
        return Branch(_condition(condition), body, [_parse_if(end[8:], rest, depth + 1)])
    if end == "else":
        otherwise, end = _parse_list(rest, depth)
    if end != "end":
        raise ValueError(f"{{{{ if {condition:.60} }}}} has no end")
    return Branch(_condition(condition), body, otherwise)


def _condition(text: str) -> str:
    """A condition in Jinja: a field, or ``and``, ``or``, ``not`` before conditions."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or len(tokens) > _MAX_DEPTH:
        raise ValueError(f"{{{{ if {text:.60} }}}} is not read")
    found, rest = _call(tokens, text)
    if rest:
        raise ValueError(f"{{{{ if {text:.60} }}}} is not read")
    return found


def _call(tokens: list[str], text: str) -> tuple[str, list[str]]:
    """A condition up to where it ends: at a closing parenthesis or the end."""
    if tokens[:1] and tokens[0] in ("and", "or", "not"):
        name, rest = tokens[0], tokens[1:]
        operands: list[str] = []
        while rest and rest[0] != ")":
            operand, rest = _operand(rest, text)
            operands.append(operand)
        if name == "not" and len(operands) == 1:
            return f"(not {operands[0]})", rest
        if name != "not" and operands:
            return f"({f' {name} '.join(operands)})", rest
        raise ValueError(f"{{{{ if {text:.60} }}}} is not read")
    return _operand(tokens, text)


def _operand(tokens: list[str], text: str) -> tuple[str, list[str]]:
    if tokens[:1] == ["("]:
        found, rest = _call(tokens[1:], text)
        if rest[:1] == [")"]:
            return found, rest[1:]
    elif tokens and tokens[0] in _FIELDS:
        return _FIELDS[tokens[0]], tokens[1:]
    raise ValueError(f"{{{{ if {text:.60} }}}} is not read")


def _has_response(nodes: Sequence[Node]) -> bool:
    """Whether the response is asked for, in a condition too: Ollama looks for the name."""
    return any(
        ("response" in node.condition or _has_response(node.body) or _has_response(node.otherwise))
        if isinstance(node, Branch)
        else node == Field("response")
        for node in nodes
    )


def _cut(nodes: Sequence[Node], *, done: bool = False) -> tuple[list[Node], bool]:
    """The nodes up to the first response, and whether it was met; branches stay, with nothing in them."""
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, Branch):
            body, done = _cut(node.body, done=done)
            otherwise, done = _cut(node.otherwise, done=done)
            kept.append(Branch(node.condition, body, otherwise))
        elif not done:
            kept.append(node)
            done = node == Field("response")
    return kept, done


def _jinja(nodes: Sequence[Node]) -> str:
    written = []
    for node in nodes:
        match node:
            case Text(text):
                written.append(f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else "")
            case Field(name):
                written.append(f"{{{{ {name} }}}}")
            case Branch(condition, body, otherwise):
                inner = f"{_jinja(body)}{{%- else -%}}{_jinja(otherwise)}"
                written.append(f"{{%- if {condition} -%}}{inner}{{%- endif -%}}")
    return "".join(written)
