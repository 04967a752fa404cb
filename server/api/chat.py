"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapter_format.messages import with_system_prompt
from server.adapters.content.manners import AdapterDefaults
from server.api.answer import answer
from server.api.generation import Generation
from server.api.protocol import ChatRequest
from server.api.scope import scope_of
from server.api.shapes import ChatShape
from server.api.state import State

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""

    def render(defaults: AdapterDefaults) -> list[list[int]]:
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        return [
            state.prompts.of(defaults).chat(
                with_system_prompt(messages, defaults.system_prompt),
                template=defaults.chat_template,
                variables=defaults.chat_template_kwargs,
            )
        ]

    scope = scope_of(http.headers.get("authorization"), body.cache_salt)
    generation = Generation(state, body, render, "messages", http.state.request_id, scope)
    return await answer(http, generation, ChatShape())
