"""Reasoning: the text that some models write before their answer, between two markers of their chat template.

=================  ======================  ===========================================================
format             markers                 families
=================  ======================  ===========================================================
``think``          ``<think>``             DeepSeek-R1, Qwen 3, SmolLM3, GLM, Hunyuan, OLMo 3, EXAONE 4
``mistral``        ``[THINK]``             Magistral
``seed``           ``<seed:think>``        Seed-OSS
``cohere``         ``<|START_THINKING|>``  Command R7B and Command A
``apertus``        ``<|inner_prefix|>``    Apertus
=================  ======================  ===========================================================

The channels of GPT-OSS are in ``tools/harmony.py``, because they carry calls as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader


@dataclass(frozen=True)
class ReasoningFormat:
    """The markers around reasoning, and the text ``behind`` it.

    Markers may be special tokens, which are otherwise not in a text.
    """

    name: str
    begin: str
    end: str
    behind: str = "\n\n"

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that a parser needs to see."""
        return (self.begin, self.end)

    def read(self, reader: TextReader, writer: PartWriter, *, opened: bool) -> Steps[None]:
        """Reasoning at the beginning of an answer, if there is some; ``opened`` if the prompt ends inside of it."""
        if not opened:
            blank = yield from _leading_space(reader, self.begin)
            if blank is None:
                return
            reader.take(blank + len(self.begin))
        yield from reader.skip_space()
        end = yield from reader.until((self.end,), writer.reasoning)
        reader.take_through(end)
        yield from reader.skip_space()


def _leading_space(reader: TextReader, marker: str) -> Steps[int | None]:
    """Length of the white space before ``marker``; None if the text begins otherwise. Nothing is consumed."""
    while True:
        text = reader.text.lstrip()
        if text.startswith(marker):
            return len(reader.text) - len(text)
        if not marker.startswith(text) or not (yield from reader.more()):
            return None


FORMATS: Sequence[ReasoningFormat] = (
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>", behind=""),
    ReasoningFormat("apertus", "<|inner_prefix|>", "<|inner_suffix|>", behind=""),
)


def reasoning_format(template: str | None) -> ReasoningFormat | None:
    """The format that a chat template writes or cuts out of earlier answers; None if it never mentions reasoning."""
    found = (format for format in FORMATS if template is not None and format.end in template)
    return next(found, None)
