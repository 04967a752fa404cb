"""Ollama's Modelfile, read as Ollama reads it (parser/parser.go): instructions, quotes, comments.

An instruction is a word in any case at the beginning of a line; its value goes to the line's end, or, where it begins
with a quote or three, to a line that ends with them. ``#`` is a comment only where an instruction could begin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_BYTES = 1024 * 1024
INSTRUCTIONS = frozenset({
    "FROM", "LICENSE", "TEMPLATE", "SYSTEM", "ADAPTER", "DRAFT", "RENDERER", "PARSER", "PARAMETER", "MESSAGE",
    "REQUIRES",
})  # fmt: skip
ROLES = ("system", "user", "assistant")

_INSTRUCTION = re.compile(r"[ \t]*([A-Za-z]+)[ \t]+(.*)", re.DOTALL)
_WORD = re.compile(r"([A-Za-z0-9_]+)[ \t]+(.*)", re.DOTALL)
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_QUOTES = ('"""', '"')


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``name`` in capitals; ``key`` is a PARAMETER's name or a MESSAGE's role, else empty."""

    name: str
    value: str
    line: int
    key: str = ""


@dataclass(frozen=True)
class Modelfile:
    """Its instructions in order."""

    instructions: Sequence[Instruction]

    def values(self, name: str) -> list[str]:
        """The values of every instruction of this name."""
        return [one.value for one in self.instructions if one.name == name]

    def last(self, name: str) -> str | None:
        """The last instruction of this name wins; None where there is none, or it says nothing."""
        values = self.values(name)
        return values[-1] if values and values[-1] else None

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Names, in small letters, and values of every PARAMETER."""
        for one in self.instructions:
            if one.name == "PARAMETER":
                yield one.key.lower(), one.value


def parse_modelfile(text: str) -> Modelfile:
    """The instructions of a file. Raises ``ValueError`` with a sentence that names the line."""
    lines = _LINES.findall(text.removeprefix("\ufeff"))
    instructions: list[Instruction] = []
    number = 0
    while number < len(lines):
        line, begun = lines[number], number + 1
        number += 1
        if not line.strip() or line.lstrip(" \t").startswith("#"):
            continue
        name, rest = _begin(line, begun)
        key, value = _keyed(name, rest, begun)
        pieces = [value.lstrip()]
        opened = next((quotes for quotes in _QUOTES if pieces[0].startswith(quotes)), "")
        while not _is_closed(pieces, opened):
            if number == len(lines):
                raise ValueError(f"line {begun}: the quote after {name} is not closed")
            pieces.append(lines[number])
            number += 1
        value = "".join(pieces).strip()
        instructions.append(Instruction(name, value[len(opened) : len(value) - len(opened)], begun, key))
    if not any(one.name == "FROM" for one in instructions):
        raise ValueError("it has no FROM, so it is no Modelfile")
    return Modelfile(instructions)


def _begin(line: str, number: int) -> tuple[str, str]:
    """The instruction's name, in capitals, and what stands behind it."""
    match = _INSTRUCTION.fullmatch(line)
    name = "" if match is None else match[1].upper()
    if match is None or name not in INSTRUCTIONS:
        known = ", ".join(sorted(INSTRUCTIONS))
        raise ValueError(f"line {number}: {line.strip()!r:.60} is no instruction with a value; there are {known}")
    return name, match[2]


def _keyed(name: str, rest: str, number: int) -> tuple[str, str]:
    """A PARAMETER's name or a MESSAGE's role, and the value behind it."""
    if name not in ("PARAMETER", "MESSAGE"):
        return "", rest
    match = _WORD.fullmatch(rest)
    if match is None:
        raise ValueError(f"line {number}: {name} needs a word and a value, and is followed by {rest.strip()!r:.60}")
    if name == "MESSAGE" and match[1] not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"line {number}: the role of a MESSAGE is {match[1]!r:.40}; it must be one of {known}")
    return match[1], match[2]


def _is_closed(pieces: Sequence[str], opened: str) -> bool:
    """Whether the last line ends with the quotes that the first one begins with."""
    last = pieces[-1].rstrip()
    return last.endswith(opened) and (len(pieces) > 1 or len(last) >= 2 * len(opened))
