"""The grammar of an answer with tool calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from server.text.grammar.grammar import (
    Grammar,
    TriggeredText,
    concatenate,
    literal,
    one_of,
    regex,
    repeat,
    triggered,
)
from server.text.grammar.schema import Source
from server.text.reasoning import ReasoningFormat
from server.text.tools.tool import Tool, ToolFormat

MAX_CALLS = 16
"""Most calls in one answer."""
_SOURCE = Source("tools", "'tools'")


def required_calls(format: ToolFormat, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
    """Calls and nothing else: one, or with ``parallel`` several."""
    return _calls(format, tools, parallel=parallel, behind="")


def possible_calls(format: ToolFormat, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
    """Text; calls may stand behind it, or in its place if the format has them only at the beginning."""
    if format.trigger:
        body = _calls(format, tools, parallel=parallel, behind=format.trigger)
        return triggered([(format.trigger, body)], most=1)
    calls = required_calls(format, tools, parallel=parallel)
    begins = [format.opening + format.grammar(tool).before for tool in tools]
    return one_of([calls, regex(pattern_without(begins), _SOURCE)])


def behind_reasoning(answer: Grammar, reasoning: ReasoningFormat, *, opened: bool, free: bool) -> Grammar:
    """``answer`` behind reasoning, which may be left out unless the prompt has ``opened`` it.

    ``free``: the answer begins with any text, and reasoning may be all of it. Text of reasoning triggers nothing.
    """
    behind = answer if free else concatenate(literal(reasoning.behind), answer)
    thought = triggered([(reasoning.end, behind)], least=0 if free else 1, most=1)
    if opened:
        return thought
    if free and isinstance(answer, TriggeredText):
        without = replace(answer, not_begin=reasoning.begin)
        return one_of([concatenate(_behind_space(reasoning.begin), thought), without])
    return answer if free else one_of([concatenate(literal(reasoning.begin), thought), answer])


def _behind_space(text: str) -> Grammar:
    """A special token behind white space, or ``text`` with it, which a lexer needs as one pattern."""
    space = r"[ \t\r\n]*"
    return one_of([concatenate(regex(space, _SOURCE), literal(text)), regex(space + re.escape(text), _SOURCE)])


def _calls(format: ToolFormat, tools: Sequence[Tool], *, parallel: bool, behind: str) -> Grammar:
    """Calls without the text ``behind`` which they stand, the beginning of the first one."""
    calls = [format.grammar(tool) for tool in tools]
    firsts = []
    for call in calls:
        before = format.opening + call.before
        assert before.startswith(behind), f"a call of {format.name} begins with its trigger"
        firsts.append(concatenate(literal(before[len(behind) :]), call.arguments, literal(call.behind)))
    parts = [one_of(firsts)]
    if parallel and format.separator is not None:
        later = one_of(concatenate(literal(call.before), call.arguments, literal(call.behind)) for call in calls)
        parts.append(repeat(concatenate(literal(format.separator), later), least=0, most=MAX_CALLS - 1))
    return concatenate(*parts, literal(format.closing))


def pattern_without(begins: Iterable[str]) -> str:
    """A regular expression for every text that begins with none of ``begins``.

    The expressions of grammars have no lookahead, so it is written as a tree of the characters that may come.
    """
    rests: dict[str, set[str]] = {}
    for begin in begins:
        assert begin
        rests.setdefault(begin[0], set()).add(begin[1:])
    others = f"[^{''.join(map(_in_class, sorted(rests)))}](?s:.)*"
    options = [f"{_in_class(char)}{pattern_without(texts)}" for char, texts in sorted(rests.items()) if "" not in texts]
    return f"(?:{'|'.join([others, *options])})?"


def _in_class(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"
