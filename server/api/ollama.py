"""Ollama's ``/api/chat``, ``/api/generate``, ``/api/embed`` and ``/api/embeddings``, over the same engine calls."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api.chat import start_chat
from server.api.completions import start_completion
from server.api.embeddings import Embeddings, embed
from server.api.formats.ollama import NANOSECONDS, OllamaChatFormat, OllamaGenerateFormat, timestamp
from server.api.formats.wire import Json
from server.api.generation import acquire, named_defaults
from server.api.ignored_fields import note_ignored_fields
from server.api.limits.bodies import BodyRoute, by_size
from server.api.protocol import ChatRequest, CompletionRequest
from server.api.protocol.ollama import (
    OllamaCall,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaRequest,
)
from server.api.responses import cancel_on_disconnect, close_unless_streamed, respond
from server.api.state import ServerState, State
from server.api.translation import chat_request, completion_request, in_own_names

router = APIRouter(route_class=BodyRoute)

_UNLIMITED = 2**31 - 1
_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "stop", "presence_penalty", "frequency_penalty")
_OWN_NAMES = {
    **{name: f"options.{name}" for name in (*_OPTIONS, "seed")},
    "max_completion_tokens": "options.num_predict",
    "max_tokens": "options.num_predict",
    "messages": "messages",
    "reasoning_effort": "think",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
}


@router.post("/api/chat")
async def ollama_chat(body: OllamaChatRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""
    await note_ignored_fields(body, http, state)
    if not body.messages:
        message = {"role": "assistant", "content": ""}
        return await _load(body, {"message": message}, http, state)
    stack = ExitStack()
    return await close_unless_streamed(_chat(body, http, state, stack), http, stack)


@router.post("/api/generate")
async def ollama_generate(body: OllamaGenerateRequest, http: Request, state: State) -> Response:
    """The answer to a prompt; with ``raw`` its continuation."""
    await note_ignored_fields(body, http, state)
    if not body.prompt:
        return await _load(body, {"response": ""}, http, state)
    stack = ExitStack()
    return await close_unless_streamed(_generate(body, http, state, stack), http, stack)


async def _chat(body: OllamaChatRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    with in_own_names(_OWN_NAMES):
        request = await start_chat(await by_size(http, chat_of, body), http, state, stack)
    return await respond(request, OllamaChatFormat, state)


async def _generate(body: OllamaGenerateRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    with in_own_names(_OWN_NAMES):
        if body.raw:
            request = await start_completion(await by_size(http, completion_of, body), http, state, stack)
        else:
            request = await start_chat(await by_size(http, chat_of_prompt, body), http, state, stack)
    return await respond(request, OllamaGenerateFormat, state)


async def _load(body: OllamaRequest, content: Json, http: Request, state: ServerState) -> Response:
    """Load the adapter, as a client asks by a request without content."""
    start = time.perf_counter()
    lease = await cancel_on_disconnect(acquire(body.model, http, state), http.receive)
    if lease is not None:
        lease.release()
    duration = int((time.perf_counter() - start) * NANOSECONDS)
    end = {"done": True, "done_reason": "load", "total_duration": duration, "load_duration": duration}
    return JSONResponse({"model": body.model, "created_at": timestamp(time.time()), **content, **end})


def chat_of(body: OllamaChatRequest) -> ChatRequest:
    """The chat request that a conversation stands for. Raises ``RequestError``."""
    return chat_request(
        {**_common(body), **_chat_fields(body), "messages": _messages(body.messages), "tools": body.tools}
    )


def chat_of_prompt(body: OllamaGenerateRequest) -> ChatRequest:
    """The chat request that a prompt stands for. Raises ``RequestError``."""
    messages = [{"role": "user", "content": body.prompt}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    return chat_request({**_common(body), **_chat_fields(body), "messages": messages})


def completion_of(body: OllamaGenerateRequest) -> CompletionRequest:
    """The completion that a raw prompt stands for. Without a template, ``system`` and ``think`` have no place."""
    length = _max_tokens(body.options.num_predict)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return completion_request({**_common(body), "prompt": body.prompt, "max_tokens": length, "logprobs": logprobs})


def _common(body: OllamaRequest) -> Json:
    options = body.options
    return {
        "model": body.model,
        "stream": body.stream,
        **{name: getattr(options, name) for name in _OPTIONS},
        "seed": None if options.seed == -1 else options.seed,  # -1 asks for a random one
        "repetition_penalty": options.repeat_penalty,
        "response_format": _response_format(body.format),
    }


def _chat_fields(body: OllamaRequest) -> Json:
    return {
        "max_completion_tokens": _max_tokens(body.options.num_predict),
        "reasoning_effort": _effort(body.think),
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs if body.logprobs else None,
    }


def _max_tokens(num_predict: int | None) -> int | None:
    """-1 and -2 ask for all the room that the context has."""
    return num_predict if num_predict is None or num_predict > 0 else _UNLIMITED


def _effort(think: bool | str | None) -> str | None:
    if isinstance(think, bool):
        return "medium" if think else "none"
    return think


def _response_format(format: str | Json | None) -> Json | None:
    if isinstance(format, dict):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format, "strict": True}}
    return {"type": "json_object"} if format == "json" else None


def _messages(turns: list[OllamaMessage]) -> list[Json]:
    """Turns as a chat's messages. Ollama's calls have no ids: a result belongs to the first open call of its tool."""
    messages: list[Json] = []
    open_calls = _OpenCalls()
    for turn in turns:
        message: Json = {"role": turn.role, "content": turn.content}
        if turn.thinking:
            message["reasoning_content"] = turn.thinking
        if turn.role == "tool":
            message["tool_call_id"] = turn.tool_call_id or open_calls.answer(turn.tool_name or turn.name)
        if turn.tool_calls:
            calls = [_call(call, f"call_{len(messages)}_{place}") for place, call in enumerate(turn.tool_calls)]
            for call in calls:
                open_calls.add(call["id"], call["function"]["name"])
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def _call(call: OllamaCall, call_id: str) -> Json:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    return {
        "id": call.id or call_id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


class _OpenCalls:
    """Calls that have no result yet, in their order; each step takes the same time for any number of them."""

    def __init__(self) -> None:
        self._calls: deque[tuple[int, str]] = deque()  # numbers and ids, also of calls that have a result by now
        self._calls_of_tool: dict[str, deque[tuple[int, str]]] = {}
        self._answered: set[int] = set()
        self._numbers = itertools.count()

    def add(self, call_id: str, tool: str) -> None:
        call = (next(self._numbers), call_id)
        self._calls.append(call)
        self._calls_of_tool.setdefault(tool, deque()).append(call)

    def answer(self, tool: str | None) -> str:
        """The id of the call that a result belongs to, which is then no longer open."""
        calls = self._calls if tool is None else self._calls_of_tool.get(tool, deque())
        while calls:
            number, call_id = calls.popleft()
            if number not in self._answered:
                self._answered.add(number)
                return call_id
        return "call_unknown"


@router.post("/api/embed")
async def ollama_embed(body: OllamaEmbedRequest, http: Request, state: State) -> Response:
    """An embedding of each input."""
    await note_ignored_fields(body, http, state)
    start = time.perf_counter()
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if not inputs:  # clients ask so whether a model is there
        await named_defaults(body.model, http, state)
        return JSONResponse({"model": body.model, "embeddings": []})
    found = await _embed(inputs, body.model, http, state, dimensions=body.dimensions, truncate=body.truncate)
    answer = {
        "model": body.model,
        "embeddings": await asyncio.to_thread(_lists, found),
        "total_duration": int((time.perf_counter() - start) * NANOSECONDS),
        "load_duration": 0,
        "prompt_eval_count": found.num_tokens,
    }
    return JSONResponse(answer, headers=found.headers)


@router.post("/api/embeddings")
async def ollama_embeddings(body: OllamaEmbeddingsRequest, http: Request, state: State) -> Response:
    """An embedding of one text, in the older form."""
    await note_ignored_fields(body, http, state)
    found = await _embed([body.prompt], body.model, http, state, param="prompt")
    answer = {"embedding": (await asyncio.to_thread(_lists, found))[0]}
    return JSONResponse(answer, headers=found.headers)


async def _embed(
    inputs: list[str],
    model: str,
    http: Request,
    state: ServerState,
    *,
    dimensions: int | None = None,
    truncate: bool = True,
    param: str = "input",
) -> Embeddings:
    truncate_to = -1 if truncate else None
    work = embed(inputs, model, http, state, dimensions=dimensions, truncate_to=truncate_to, param=param)
    return await cancel_on_disconnect(work, http.receive)


def _lists(found: Embeddings) -> list[list[float]]:
    return [vector.tolist() for vector in found.vectors]
