"""``POST /v1/chat/completions`` and ``POST /v1/completions``: lease the adapter, render the prompts, queue, respond."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapter_format.messages import with_system_prompt
from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.generation import Prompts, leased, submit
from server.api.protocol import ChatRequest, CompletionRequest, GenerationRequest
from server.api.response_formats import ChatFormat, CompletionFormat
from server.api.responses import respond, unless_gone
from server.api.state import State
from server.errors import InvalidRequest
from server.text.prompt import PromptRenderer
from server.text.token_texts import TokenTexts

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""

    async def work() -> Response:
        async with leased(body, state) as (lease, defaults):
            prompts = await asyncio.to_thread(_chat_prompt, body, defaults, state.prompts)
            format = ChatFormat(_token_texts(body, prompts))
            request = submit(body, http, state, lease=lease, defaults=defaults, prompts=prompts)
        return await respond(request, format, state)

    return await unless_gone(work(), http.receive)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, http: Request, state: State) -> Response:
    """The continuation of one or several texts; choice ``prompt * n + i`` is answer ``i`` to a prompt."""

    async def work() -> Response:
        async with leased(body, state) as (lease, defaults):
            prompts = await asyncio.to_thread(_text_prompts, body, defaults, state.prompts)
            format = CompletionFormat(_token_texts(body, prompts))
            request = submit(body, http, state, lease=lease, defaults=defaults, prompts=prompts)
        return await respond(request, format, state)

    return await unless_gone(work(), http.receive)


def _token_texts(body: GenerationRequest, prompts: Prompts) -> TokenTexts | None:
    """What names the tokens of the answers; None where no log probabilities are asked for."""
    return None if body.num_logprobs is None else prompts.renderer.token_texts


def _chat_prompt(body: ChatRequest, defaults: GenerationDefaults, base: PromptRenderer) -> Prompts:
    """In a thread: the conversation by the adapter's or the base's chat template."""
    renderer = base.of(defaults)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    ids = renderer.chat(
        with_system_prompt(messages, defaults.system_prompt),
        template=defaults.chat_template,
        variables=defaults.chat_template_kwargs,
    )
    return Prompts([ids], renderer, "messages")


def _text_prompts(body: CompletionRequest, defaults: GenerationDefaults, base: PromptRenderer) -> Prompts:
    """In a thread: texts as token ids; token ids as they are."""
    renderer = base.of(defaults)
    return Prompts([_prompt_ids(prompt, renderer) for prompt in body.prompt], renderer, "prompt")


def _prompt_ids(prompt: str | list[int], renderer: PromptRenderer) -> list[int]:
    if isinstance(prompt, str):
        return renderer.completion(prompt)
    if max(prompt) >= renderer.vocab_size:
        raise InvalidRequest(f"Invalid 'prompt': token ids should be below {renderer.vocab_size}.", param="prompt")
    return prompt
