"""Reading JSON values out of a text that is arriving, without waiting for their end."""

from __future__ import annotations

import json

from server.text.text_reader import Emit, Steps, TextReader

_OPENING, _CLOSING = "{[", "}]"
_END_OF_SCALAR = ",}] \t\r\n"


class _Scanner:
    """Finds the end of one JSON value. It counts brackets outside of strings, and checks nothing else."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._in_scalar = False

    def end(self, text: str) -> int | None:
        """The number of characters up to the end of the value; None if it goes on behind ``text``."""
        for place, char in enumerate(text):
            if self._in_string:
                self._read_in_string(char)
                closed = not self._in_string
            elif self._in_scalar:
                if char in _END_OF_SCALAR:
                    return place
                closed = False
            else:
                closed = self._read(char)
            if closed and self._depth == 0:
                return place + 1
        return None

    def _read_in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False

    def _read(self, char: str) -> bool:
        """Outside of strings; whether a bracket was closed."""
        if char == '"':
            self._in_string = True
        elif char in _OPENING:
            self._depth += 1
        elif char in _CLOSING:
            self._depth -= 1
            return True
        elif self._depth == 0:
            self._in_scalar = True
        return False


def read_value(reader: TextReader, emit: Emit) -> Steps[bool]:
    """Emit the text of one JSON value as it arrives; False if the text ends before the value does."""
    scanner = _Scanner()
    while True:
        end = scanner.end(reader.text)
        if end is not None:
            emit(reader.take(end))
            return True
        if reader.text:
            emit(reader.take(len(reader.text)))
        if not (yield from reader.more()):
            return False


def read_string(reader: TextReader) -> Steps[str | None]:
    """One JSON string, decoded; None if there is none."""
    if not (yield from reader.starts_with('"')):
        return None
    pieces: list[str] = []
    if not (yield from read_value(reader, lambda piece: pieces.append(piece.text))):
        return None
    try:
        value = json.loads("".join(pieces), strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
