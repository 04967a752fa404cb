"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``, translated to chat requests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chat import count_prompt_tokens, start_chat
from server.api.envelopes import request_id_header
from server.api.formats.anthropic import MessagesFormat
from server.api.formats.wire import Json
from server.api.ignored_fields import note_ignored_fields
from server.api.limits.bodies import BodyRoute, by_size
from server.api.protocol import ChatRequest
from server.api.protocol.anthropic import (
    AnthropicMessage,
    AnthropicPrompt,
    AnthropicTool,
    AnthropicToolChoice,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from server.api.responses import close_unless_streamed, respond
from server.api.state import ServerState, State
from server.api.translation import chat_request, in_own_names

router = APIRouter(route_class=BodyRoute)

_OWN_NAMES = {
    "max_completion_tokens": "max_tokens",
    "messages": "messages",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning_effort": "thinking",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "tool_choice": "tool_choice",
    "tools": "tools",
    "user": "metadata.user_id",
}


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""
    await note_ignored_fields(body, http, state)
    stack = ExitStack()
    response = await close_unless_streamed(_respond(body, http, state, stack), http, stack)
    response.headers.update(request_id_header(http.scope["path"], http.state.request_id))
    return response


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: AnthropicPrompt, http: Request, state: State) -> dict[str, int]:
    """The length of the prompt that a message would be the answer to."""
    await note_ignored_fields(body, http, state)
    with in_own_names(_OWN_NAMES):
        chat = await by_size(http, _prompt_to_chat, body)
        return {"input_tokens": await count_prompt_tokens(chat, http, state)}


async def _respond(body: MessagesRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    with in_own_names(_OWN_NAMES):
        request = await start_chat(await by_size(http, to_chat, body), http, state, stack)
    return await respond(request, partial(MessagesFormat, body), state)


def to_chat(body: MessagesRequest) -> ChatRequest:
    """The chat request that a body stands for. Raises ``RequestError``."""
    return chat_request(
        {
            **_prompt(body),
            "stream": body.stream,
            "max_completion_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
            "user": None if body.metadata is None else body.metadata.user_id,
        }
    )


def _prompt_to_chat(body: AnthropicPrompt) -> ChatRequest:
    return chat_request(_prompt(body))


def _prompt(body: AnthropicPrompt) -> Json:
    messages: list[Json] = [] if body.system is None else [{"role": "system", "content": _parts(body.system)}]
    for message in body.messages:
        messages += _assistant_turn(message) if message.role == "assistant" else _other_turns(message)
    return {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(tool) for tool in body.tools],
        **_tool_choice(body.tool_choice),
        "reasoning_effort": _effort(body),
        "response_format": _response_format(body),
        **_continuation(body),
    }


def _assistant_turn(message: AnthropicMessage) -> list[Json]:
    turn: Json = {"role": "assistant", "content": _parts(_texts(message)) or None}
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    calls = [_call(block) for block in message.content if isinstance(block, ToolUseBlock)]
    if calls:
        turn["tool_calls"] = calls
    return [turn]


def _other_turns(message: AnthropicMessage) -> list[Json]:
    """Results of tools are turns of their own, before the text of the turn that has them."""
    results = [block for block in message.content if isinstance(block, ToolResultBlock)]
    turns: list[Json] = [
        {"role": "tool", "tool_call_id": result.tool_use_id, "content": _parts(result.content) or ""}
        for result in results
    ]
    texts = _parts(_texts(message))
    if texts or not results:
        turns.append({"role": message.role, "content": texts})
    return turns


def _texts(message: AnthropicMessage) -> list[TextBlock]:
    return [block for block in message.content if isinstance(block, TextBlock)]


def _parts(blocks: Iterable[TextBlock]) -> list[Json]:
    return [{"type": "text", "text": block.text} for block in blocks]


def _call(block: ToolUseBlock) -> Json:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _tool(tool: AnthropicTool) -> Json:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _tool_choice(choice: AnthropicToolChoice | None) -> Json:
    if choice is None:
        return {}
    named = {"type": "function", "function": {"name": choice.name}}
    choices = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    parallel = False if choice.disable_parallel_tool_use else None
    return {"tool_choice": choices[choice.type], "parallel_tool_calls": parallel}


def _effort(body: AnthropicPrompt) -> str | None:
    """Reasoning as in a chat request: off, of a given effort, or on; the model's own choice where nothing is asked."""
    if body.thinking is not None and body.thinking.type == "disabled":
        return "none"
    effort = None if body.output_config is None else body.output_config.effort
    if effort is None and body.thinking is not None and body.thinking.type == "enabled":
        return "medium"
    return effort


def _response_format(body: AnthropicPrompt) -> Json | None:
    format = body.output_format
    if body.output_config is not None and body.output_config.format is not None:
        format = body.output_config.format
    if format is None or format.get("type") != "json_schema":
        return format
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format.get("schema"), "strict": True}}


def _continuation(body: AnthropicPrompt) -> dict[str, Any]:
    """A last turn of the assistant without calls is the beginning of the answer."""
    last = body.messages[-1] if body.messages else None
    if last is None or last.role != "assistant" or not all(isinstance(block, TextBlock) for block in last.content):
        return {}
    return {"continue_final_message": True, "add_generation_prompt": False}
