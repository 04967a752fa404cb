"""``/v1/responses``: OpenAI's Responses API without stored state, translated to a chat request."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chat import start_chat
from server.api.formats.responses import ResponsesFormat
from server.api.formats.wire import Json
from server.api.ignored_fields import note_ignored_fields
from server.api.limits.bodies import BodyRoute, by_size
from server.api.protocol import ChatRequest
from server.api.protocol.responses import (
    LOGPROBS,
    FunctionCallItem,
    InputMessage,
    ReasoningItem,
    ResponsesItem,
    ResponsesRequest,
    ResponsesText,
)
from server.api.responses import close_unless_streamed, respond
from server.api.state import ServerState, State
from server.api.translation import chat_request, in_own_names

router = APIRouter(route_class=BodyRoute)

_OWN_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
_SAME_NAMES = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "parallel_tool_calls",
    "user",
    "cache_salt",
    "lora_scale",
    "chat_template_kwargs",
)


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, http: Request, state: State) -> Response:
    """A response to a conversation, of which nothing is stored."""
    await note_ignored_fields(body, http, state)
    stack = ExitStack()
    return await close_unless_streamed(_respond(body, http, state, stack), http, stack)


async def _respond(body: ResponsesRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    with in_own_names(_OWN_NAMES):
        request = await start_chat(await by_size(http, to_chat, body), http, state, stack)
    return await respond(request, partial(ResponsesFormat, body), state)


def to_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat request that a body stands for. Raises ``RequestError``."""
    with_logprobs = LOGPROBS in body.include
    return chat_request(
        {
            **{name: getattr(body, name) for name in _SAME_NAMES},
            "messages": _messages(body),
            "max_completion_tokens": body.max_output_tokens,
            "tools": [{"type": "function", "function": _without_type(tool.model_dump())} for tool in body.tools],
            "tool_choice": _tool_choice(body.tool_choice),
            "response_format": None if body.text is None else _nested("json_schema", body.text.format),
            "verbosity": None if body.text is None else body.text.verbosity,
            "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
            "logprobs": with_logprobs,
            "top_logprobs": body.top_logprobs if with_logprobs else None,
        }
    )


def _messages(body: ResponsesRequest) -> list[Json]:
    """The items as messages; reasoning, text and calls of one turn are one message of the assistant."""
    messages: list[Json] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    for item in body.input:
        _append(messages, item)
    return messages


def _append(messages: list[Json], item: ResponsesItem) -> None:
    if isinstance(item, InputMessage) and item.role != "assistant":
        messages.append({"role": item.role, "content": _parts(item.content)})
    elif isinstance(item, InputMessage):
        _assistant_turn(messages, "content", "tool_calls")["content"] = _parts(item.content)
    elif isinstance(item, ReasoningItem):
        texts = item.content or item.summary
        turn = _assistant_turn(messages, "reasoning_content", "content", "tool_calls")
        turn["reasoning_content"] = "".join(part.text for part in texts)
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        calls = _assistant_turn(messages).setdefault("tool_calls", [])
        calls.append({"id": item.call_id, "type": "function", "function": function})
    else:
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _parts(item.output)})


def _assistant_turn(messages: list[Json], *but_with: str) -> Json:
    """The last message if it is the assistant's and has none of these keys yet, or else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or any(key in messages[-1] for key in but_with):
        messages.append({"role": "assistant"})
    return messages[-1]


def _parts(texts: list[ResponsesText]) -> list[Json]:
    return [{"type": "text", "text": part.text} for part in texts]


def _tool_choice(choice: str | Json | None) -> Any:
    """OpenAI nests in chat what is flat here: the name of a function, the allowed tools."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        nested = [_nested("function", tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {**_without_type(choice), "tools": nested}}
    return _nested("function", choice)


def _nested(kind: str, value: Any) -> Any:
    """``{"type": kind, ...}`` as ``{"type": kind, kind: {...}}``; any other value as it is, to be refused by name."""
    if not isinstance(value, dict) or value.get("type") != kind:
        return value
    return {"type": kind, kind: _without_type(value)}


def _without_type(value: Json) -> Json:
    return {key: item for key, item in value.items() if key != "type"}
