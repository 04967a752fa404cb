"""The grammar of a request's answers: compiled in a worker thread before the request is submitted."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from server.api.generation import Prompts
from server.api.protocol import GenerationRequest
from server.errors import InvalidRequest, ServerOverloaded
from server.text.grammar.compiler import CompiledGrammar, GrammarCompiler

MAX_SECONDS = 5.0
"""Longest wait for a grammar, with those compiled before it."""


async def with_grammar(body: GenerationRequest, prompts: Prompts, compiler: GrammarCompiler) -> Prompts:
    """The prompts with the grammar that their answers follow; the same prompts if that is any text.

    Raises ``InvalidRequest`` if it cannot be compiled, ``ServerOverloaded`` if others take too long.
    """
    future = compiler.pool.submit(_compiled, body, prompts, compiler)
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(_forget_error)
    try:
        done, _ = await asyncio.wait({waiting}, timeout=MAX_SECONDS)
    except asyncio.CancelledError:
        future.cancel()
        raise
    if done:
        return replace(prompts, grammar=waiting.result())
    if future.cancel():
        raise ServerOverloaded("The server is compiling the schemas of other requests. Try again later.")
    raise InvalidRequest(
        f"The schemas of this request take more than {MAX_SECONDS:.0f} seconds to compile: simplify them.",
        param="response_format" if body.is_constrained else "tools",
        code="invalid_json_schema",
    )


def _compiled(body: GenerationRequest, prompts: Prompts, compiler: GrammarCompiler) -> CompiledGrammar | None:
    grammar = prompts.answers.grammar(body.answer_grammar())
    return None if grammar is None else compiler.compile(grammar, prompts.renderer.grammar_tokenizer)


def _forget_error(waiting: asyncio.Future[CompiledGrammar | None]) -> None:
    """Mark an error as seen, also where nobody waits for it any more."""
    if not waiting.cancelled():
        waiting.exception()
