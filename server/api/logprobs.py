"""Log probabilities of a choice's tokens, in the forms of OpenAI's chat and completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from server.sequence import SampledToken
from server.text.detokenizer import TokenStart
from server.text.token_texts import TokenText, TokenTexts

Json = dict[str, Any]

_LEAST = -9999.0
"""OpenAI's value for a log probability of minus infinity, which JSON cannot express."""


def chat_logprobs(tokens: Sequence[TokenStart], texts: TokenTexts) -> Json:
    """``logprobs`` of a chat choice or chunk. Bytes that are not whole characters have an escaped ``token``."""
    content = []
    for (token, _), is_first in zip(tokens, _are_first(tokens, texts), strict=True):
        entry = _chat_token(texts.get(token.id, first=is_first), _logprob(token))
        entry["top_logprobs"] = [
            _chat_token(texts.get(top_id, first=is_first), logprob) for top_id, logprob in token.top_logprobs
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenStart], texts: TokenTexts) -> Json:
    """``logprobs`` of a completion choice or chunk. Of tokens with the same text, only the likeliest is listed.

    The first token of a prompt has none.
    """
    names: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for (token, _), is_first in zip(tokens, _are_first(tokens, texts), strict=True):
        names.append(_completion_token(texts.get(token.id, first=is_first)))
        token_logprobs.append(None if token.logprob is None else _logprob(token))
        if token.logprob is None:
            top_logprobs.append(None)
            continue
        by_text: dict[str, float] = {}
        for top_id, logprob in token.top_logprobs:
            by_text.setdefault(_completion_token(texts.get(top_id, first=is_first)), max(logprob, _LEAST))
        by_text.setdefault(names[-1], _logprob(token))
        top_logprobs.append(by_text)
    return {
        "tokens": names,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": [start for _, start in tokens],
    }


def prompt_logprobs(tokens: Sequence[SampledToken], count: int, texts: TokenTexts) -> list[Json | None]:
    """vLLM's ``prompt_logprobs``: for each token of a prompt an object by token id, null for the first one.

    ``tokens`` are those behind the first; each object has the token and the ``count`` likeliest.
    """
    entries: list[Json | None] = [None]
    for token in tokens:
        by_id = {str(token.id): _ranked(token.id, _logprob(token), token.rank, texts)}
        for rank, (top_id, logprob) in enumerate(token.top_logprobs[:count], 1):
            by_id.setdefault(str(top_id), _ranked(top_id, max(logprob, _LEAST), rank, texts))
        entries.append(by_id)
    return entries


def _ranked(token_id: int, logprob: float, rank: int | None, texts: TokenTexts) -> Json:
    text = texts.get(token_id, first=False)
    return {"logprob": logprob, "rank": rank, "decoded_token": _escaped(text) if text.text is None else text.text}


def _are_first(tokens: Sequence[TokenStart], texts: TokenTexts) -> Iterator[bool]:
    """For each token whether the tokens before it in the answer are special.

    Tokens that begin at character 0 are always in the same delta, so earlier deltas need not be known.
    """
    is_first = True
    for token, start in tokens:
        is_first = is_first and start == 0
        yield is_first
        is_first = is_first and texts.is_special(token.id)


def _logprob(token: SampledToken) -> float:
    assert token.logprob is not None, "the sequence did not ask for log probabilities"
    return max(token.logprob, _LEAST)


def _chat_token(token: TokenText, logprob: float) -> Json:
    text = _escaped(token) if token.text is None else token.text
    return {
        "token": text,
        "logprob": max(logprob, _LEAST),
        "bytes": None if token.data is None else list(token.data),
    }


def _completion_token(token: TokenText) -> str:
    return f"bytes:{_escaped(token)}" if token.text is None else token.text


def _escaped(token: TokenText) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token.data or b"")
