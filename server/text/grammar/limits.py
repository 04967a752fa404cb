"""Limits on the work that llguidance may do for a grammar, in a trial and in the server alike."""

from __future__ import annotations

from llguidance import LLParserLimits

MAX_GRAMMAR_BYTES = 512 * 1024
"""Most bytes of a composed grammar."""


def parser_limits() -> LLParserLimits:
    """Those of llguidance, with longer rows for objects of a thousand optional properties, and fewer lexer states.

    A step takes at most some 15 ms of work, and the states of a lexer at most some 50 MB.
    """
    return LLParserLimits(max_items_in_row=20_000, max_lexer_states=25_000, verbose_errors=False)
