"""``POST /v1/chat/completions`` and ``POST /v1/completions``: how each renders its prompts, and its format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapter_format.messages import with_system_prompt
from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.generation import Prompts
from server.api.protocol import ChatRequest, CompletionRequest
from server.api.response_formats import ChatFormat, CompletionFormat
from server.api.responses import respond
from server.api.state import State
from server.errors import InvalidRequest
from server.text.prompt import PromptRenderer

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""
    return await respond(body, http, state, render=_chat_prompt, make_format=ChatFormat)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, http: Request, state: State) -> Response:
    """The continuation of one or several texts; choice ``prompt * n + i`` is answer ``i`` to a prompt."""
    return await respond(body, http, state, render=_text_prompts, make_format=CompletionFormat)


def _chat_prompt(body: ChatRequest, defaults: GenerationDefaults, base: PromptRenderer) -> Prompts:
    """In a thread: the conversation by the adapter's or the base's chat template."""
    renderer = base.for_adapter(defaults)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    ids = renderer.chat(
        with_system_prompt(messages, defaults.system_prompt),
        template=defaults.chat_template,
        variables=defaults.chat_template_kwargs,
    )
    return Prompts([ids], renderer, "messages")


def _text_prompts(body: CompletionRequest, defaults: GenerationDefaults, base: PromptRenderer) -> Prompts:
    """In a thread: texts as token ids; token ids as they are."""
    renderer = base.for_adapter(defaults)
    return Prompts([_prompt_ids(prompt, renderer) for prompt in body.prompt], renderer, "prompt")


def _prompt_ids(prompt: str | list[int], renderer: PromptRenderer) -> list[int]:
    if isinstance(prompt, str):
        return renderer.completion(prompt)
    if max(prompt) >= renderer.vocab_size:
        raise InvalidRequest(f"Invalid 'prompt': token ids should be below {renderer.vocab_size}.", param="prompt")
    return prompt
