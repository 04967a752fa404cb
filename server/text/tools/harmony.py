"""The channels of GPT-OSS ("harmony"): reasoning, calls and the answer are messages, each with a header.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``
The header of a call names its function: ``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}``.
Source: OpenAI's description of the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.reasoning import ReasoningFormat
from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader
from server.text.tools.tool import CallGrammar, Tool

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CALL, CONSTRAIN, RETURN = "<|call|>", "<|constrain|>", "<|return|>"
FINAL = f"{CHANNEL}final{MESSAGE}"
HARMONY_REASONING = ReasoningFormat("harmony", f"{CHANNEL}analysis{MESSAGE}", END, behind=f"{START}assistant")
"""For the grammar of an answer; ``Harmony`` reads it."""
MAX_HEADER_LENGTH = 512
_TO_FUNCTION = "to=functions."


@dataclass(frozen=True)
class Harmony:
    """An answer has at most one call, because a call ends the answer."""

    name = "harmony"
    markers = (START, CHANNEL, MESSAGE, END, CALL, CONSTRAIN, RETURN)
    trigger = f"{CHANNEL}commentary {_TO_FUNCTION}"
    opening = closing = ""
    separator = None

    def grammar(self, tool: Tool) -> CallGrammar:
        before = f"{self.trigger}{tool.name} {CONSTRAIN}json{MESSAGE}"
        return CallGrammar(before, tool.json_arguments(), "")

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{self.trigger}{name} {CONSTRAIN}json{MESSAGE}{json.dumps(arguments, ensure_ascii=False)}{CALL}"

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool] = ()) -> Steps[None]:
        while True:
            if not (yield from reader.starts_with(START, CHANNEL, " to=")):
                yield from reader.until((END, START, CHANNEL), writer.content, trim=False)
                yield from reader.skip(END)
                if not reader.text and reader.ended:
                    return
                if not (yield from reader.starts_with(START, CHANNEL)) and reader.ended:
                    yield from reader.until((), writer.content)
                    return
                continue
            header = yield from reader.read_until(MESSAGE, limit=MAX_HEADER_LENGTH)
            if header is None:
                reader.take_rest()
                return
            yield from self._read_message(header, reader, writer)

    def _read_message(self, header: str, reader: TextReader, writer: PartWriter) -> Steps[None]:
        emit = writer.content
        if _TO_FUNCTION in header:
            name = header.partition(_TO_FUNCTION)[2].partition("<")[0].split()
            writer.call(name[0] if name else "")
            emit = writer.arguments
        elif "analysis" in header:
            emit = writer.reasoning
        end = yield from reader.until((END, CALL, RETURN, START), emit, trim=False)
        if end != START:
            reader.take_through(end)
