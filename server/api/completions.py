"""``/v1/completions``: lease the adapter, tokenize the prompts, submit, respond."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.active_request import ActiveRequest
from server.api.formats.completions import CompletionFormat
from server.api.generation import Prompts, leased, submit
from server.api.ignored_fields import note_ignored_fields
from server.api.limits.bodies import BodyRoute
from server.api.protocol import CompletionRequest
from server.api.responses import close_unless_streamed, respond
from server.api.state import ServerState, State
from server.api.structured import with_grammar
from server.text.prompt import PromptRenderer
from server.text.prompt_text import PromptText, prompt_text

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, http: Request, state: State) -> Response:
    """The continuation of one or several texts; choice ``prompt * n + i`` is answer ``i`` to a prompt."""
    await note_ignored_fields(body, http, state)
    stack = ExitStack()
    return await close_unless_streamed(_respond(body, http, state, stack), http, stack)


async def _respond(body: CompletionRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    return await respond(await start_completion(body, http, state, stack), CompletionFormat, state)


async def start_completion(
    body: CompletionRequest, http: Request, state: ServerState, stack: ExitStack
) -> ActiveRequest:
    """As ``start_chat``, for prompts without a chat template."""
    async with leased(body, http, state) as (lease, defaults):
        prompts = await state.prompt_threads.run(http, _tokenize, body, defaults, state.prompts)
        if body.is_constrained:
            prompts = await with_grammar(body, prompts, state.grammars)
        request = submit(body, http, state, lease=lease, defaults=defaults, prompts=prompts)
        return stack.enter_context(request)


def _tokenize(body: CompletionRequest, defaults: GenerationDefaults, base: PromptRenderer) -> Prompts:
    """In a thread: texts as token ids; token ids as they are."""
    renderer = base.for_adapter(defaults)
    ids = [renderer.prompt_ids(prompt) for prompt in body.prompt]
    if not body.echo:
        return Prompts(ids, renderer, "prompt")
    texts = [_echo(prompt, prompt_ids, renderer) for prompt, prompt_ids in zip(body.prompt, ids, strict=True)]
    return Prompts(ids, renderer, "prompt", texts=texts)


def _echo(prompt: str | list[int], ids: list[int], renderer: PromptRenderer) -> PromptText:
    """The text of a prompt with its special tokens, but for those that the tokenizer puts before a text."""
    num_hidden = renderer.num_added(prompt, ids) if isinstance(prompt, str) else 0
    return prompt_text(ids, renderer.decode_all, num_hidden=num_hidden)
