"""``/v1/chat/completions`` and ``/v1/completions``: lease the adapter, render the prompts, submit, respond."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapter_format.messages import with_system_prompt
from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.generation import Prompts, leased, submit
from server.api.protocol import ChatRequest, CompletionRequest, GenerationRequest
from server.api.response_formats import ChatFormat, CompletionFormat
from server.api.responses import close_unless_streamed, respond
from server.api.state import ServerState, State
from server.errors import InvalidRequest
from server.text.prompt import PromptRenderer
from server.text.token_texts import TokenTexts

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""
    stack = ExitStack()
    return await close_unless_streamed(_chat(body, http, state, stack), http, stack)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, http: Request, state: State) -> Response:
    """The continuation of one or several texts; choice ``prompt * n + i`` is answer ``i`` to a prompt."""
    stack = ExitStack()
    return await close_unless_streamed(_completion(body, http, state, stack), http, stack)


async def _chat(body: ChatRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    async with leased(body, state) as (lease, defaults):
        prompts = await asyncio.to_thread(_chat_prompt, body, defaults, state.prompts)
        request = submit(body, http, state, lease=lease, defaults=defaults, prompts=prompts)
        stack.enter_context(request)
    return await respond(request, ChatFormat(_token_texts(body, prompts)), state)


async def _completion(body: CompletionRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    async with leased(body, state) as (lease, defaults):
        prompts = await asyncio.to_thread(_text_prompts, body, defaults, state.prompts)
        request = submit(body, http, state, lease=lease, defaults=defaults, prompts=prompts)
        stack.enter_context(request)
    return await respond(request, CompletionFormat(_token_texts(body, prompts)), state)


def _token_texts(body: GenerationRequest, prompts: Prompts) -> TokenTexts | None:
    """Where log probabilities are asked for: the text and bytes of their tokens."""
    return None if body.num_logprobs is None else prompts.renderer.token_texts


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
