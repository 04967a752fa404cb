"""What the answers to one prompt look like: whether their text has reasoning in it."""

from __future__ import annotations

from dataclasses import dataclass

from server.text.answer import AnswerParser, PlainParser
from server.text.reasoning import ReasoningFormat
from server.text.stepped_parser import PartWriter, SteppedParser
from server.text.text_reader import Steps, TextReader


@dataclass(frozen=True)
class AnswerFormat:
    """``reasoning_open``: the prompt ends inside of reasoning."""

    reasoning: ReasoningFormat | None = None
    reasoning_open: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser has to see, also where they are special tokens."""
        return () if self.reasoning is None else self.reasoning.markers

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        return PlainParser() if self.reasoning is None else SteppedParser(self._read, PartWriter())

    def _read(self, reader: TextReader, writer: PartWriter) -> Steps[None]:
        if self.reasoning is not None:
            yield from self.reasoning.read(reader, writer, opened=self.reasoning_open)
        yield from reader.until((), writer.content)


PLAIN = AnswerFormat()
