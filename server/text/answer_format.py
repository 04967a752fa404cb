"""What the answers to one prompt look like: reasoning, content and tool calls, and in which format."""

from __future__ import annotations

from dataclasses import dataclass

from server.text.answer import AnswerParser, PlainParser
from server.text.grammar.grammar import Grammar, concatenate, literal, one_of
from server.text.reasoning import ReasoningFormat
from server.text.stepped_parser import PartWriter, SteppedParser, new_call_id, new_short_call_id
from server.text.text_reader import Steps, TextReader
from server.text.tools.composition import behind_reasoning, possible_calls, required_calls
from server.text.tools.families import HARMONY, takes_short_ids
from server.text.tools.harmony import FINAL, HARMONY_REASONING
from server.text.tools.tool import Tool, ToolFormat


@dataclass(frozen=True)
class AnswerFormat:
    """``reasoning_open``: the prompt ends inside of reasoning. Without ``tool_format`` no calls are looked for.

    ``required``: the answer is calls of ``tools`` and nothing else; ``parallel``: it may have several.
    """

    reasoning: ReasoningFormat | None = None
    reasoning_open: bool = False
    tool_format: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    required: bool = False
    parallel: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser has to see, also where they are special tokens."""
        of_reasoning = () if self.reasoning is None else self.reasoning.markers
        of_tools = () if self.tool_format is None else self.tool_format.markers
        return (*of_reasoning, *of_tools)

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        if self.reasoning is None and self.tool_format is None:
            return PlainParser()
        new_id = new_short_call_id if takes_short_ids(self.tool_format) else new_call_id
        return SteppedParser(self._read, PartWriter(new_id, max_calls=None if self.parallel else 1))

    def _read(self, reader: TextReader, writer: PartWriter) -> Steps[None]:
        if self.reasoning is not None:
            yield from self.reasoning.read(reader, writer, opened=self.reasoning_open)
        if self.tool_format is not None:
            yield from self.tool_format.read(reader, writer, self.tools)
        yield from reader.until((), writer.content)

    def grammar(self, content: Grammar | None = None) -> Grammar | None:
        """What the text may be; None for any text. ``content`` is what an answer without calls may be.

        Raises ``InvalidRequest`` for the schema of a tool that cannot be followed.
        """
        if content is not None and self.tool_format is HARMONY:
            content = concatenate(literal(FINAL), content)
        answer = self._behind_reasoning(content)
        if answer is None:
            return None
        reasoning = HARMONY_REASONING if self.tool_format is HARMONY else self.reasoning
        if reasoning is None:
            return answer
        free = not self.required and content is None
        if free and reasoning is HARMONY_REASONING:
            return answer
        return behind_reasoning(answer, reasoning, opened=self.reasoning_open, free=free)

    def _behind_reasoning(self, content: Grammar | None) -> Grammar | None:
        if self.tool_format is None or not self.tools:
            return content
        if not self.required and content is None:
            return possible_calls(self.tool_format, self.tools, parallel=self.parallel)
        calls = required_calls(self.tool_format, self.tools, parallel=self.parallel)
        return calls if self.required or content is None else one_of([calls, content])


PLAIN = AnswerFormat()
