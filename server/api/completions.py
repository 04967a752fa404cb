"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.adapters.content.manners import AdapterDefaults
from server.api.answer import answer
from server.api.generation import Generation
from server.api.protocol import CompletionRequest
from server.api.scope import scope_of
from server.api.shapes import CompletionShape
from server.api.state import State
from server.errors import InvalidRequest
from server.text.prompt import PromptRenderer

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, http: Request, state: State) -> Response:
    """The continuation of one or several texts; choice ``prompt * n + i`` is answer ``i`` to a prompt."""

    def render(defaults: AdapterDefaults) -> list[list[int]]:
        prompts = state.prompts.of(defaults)
        return [_ids(prompt, prompts) for prompt in body.prompt]

    scope = scope_of(http.headers.get("authorization"), body.cache_salt)
    generation = Generation(state, body, render, "prompt", http.state.request_id, scope)
    return await answer(http, generation, CompletionShape())


def _ids(prompt: str | list[int], prompts: PromptRenderer) -> list[int]:
    if isinstance(prompt, str):
        return prompts.completion(prompt)
    if max(prompt) >= prompts.vocab_size:
        raise InvalidRequest(f"Invalid 'prompt': token ids should be below {prompts.vocab_size}.", param="prompt")
    return prompt
