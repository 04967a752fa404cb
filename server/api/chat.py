"""``/v1/chat/completions``, and the steps that every API of conversations shares: lease, render, submit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapter_format.messages import with_system_prompt
from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.active_request import ActiveRequest
from server.api.formats.chat import ChatFormat
from server.api.generation import Prompts, leased, named_defaults, submit
from server.api.ignored_fields import IgnoredFields, note_ignored, note_ignored_fields
from server.api.limits.bodies import BodyRoute
from server.api.protocol import ChatRequest
from server.api.protocol.messages import template_messages
from server.api.responses import close_unless_streamed, respond
from server.api.state import ServerState, State
from server.api.structured import with_grammar
from server.api.tool_use import answer_format, format_of_tools, with_tools
from server.text.prompt import PromptRenderer
from server.text.template_variables import TemplateVariables, requested_variables

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, http: Request, state: State) -> Response:
    """The assistant's next turn in a conversation."""
    await note_ignored_fields(body, http, state)
    stack = ExitStack()
    return await close_unless_streamed(_respond(body, http, state, stack), http, stack)


async def _respond(body: ChatRequest, http: Request, state: ServerState, stack: ExitStack) -> Response:
    return await respond(await start_chat(body, http, state, stack), ChatFormat, state)


async def start_chat(body: ChatRequest, http: Request, state: ServerState, stack: ExitStack) -> ActiveRequest:
    """The request, submitted and entered into ``stack``, which ``close_unless_streamed`` closes.

    Raises every error that can be found before the first token but those of the engine.
    """
    async with leased(body, http, state) as (lease, defaults):
        prompts = await state.prompt_threads.run(http, _render, body, defaults, state.prompts)
        note_ignored(IgnoredFields.of((name,) for name in prompts.unused_fields), http, state)
        if body.is_constrained or prompts.answers.tool_format is not None:
            prompts = await with_grammar(body, prompts, state.grammars)
        request = submit(body, http, state, lease=lease, defaults=defaults, prompts=prompts)
        return stack.enter_context(request)


async def count_prompt_tokens(body: ChatRequest, http: Request, state: ServerState) -> int:
    """The length of the prompt that a conversation is rendered to."""
    return len((await render_prompt(body, http, state)).ids[0])


async def render_prompt(body: ChatRequest, http: Request, state: ServerState) -> Prompts:
    """The prompt that a conversation is rendered to; the adapter's weights are not loaded."""
    defaults = await named_defaults(body.model, http, state, user=body.user)
    return await state.prompt_threads.run(http, _render, body, defaults, state.prompts)


def _render(body: ChatRequest, defaults: GenerationDefaults, base: PromptRenderer) -> Prompts:
    """In a thread: the conversation by the adapter's or the base's chat template."""
    renderer = base.for_adapter(defaults)
    template = defaults.chat_template or renderer.chat_template
    format = format_of_tools(template, defaults.tool_format)
    messages: Sequence[Mapping[str, Any]] = template_messages(body.messages)
    messages = with_system_prompt(messages, defaults.system_prompt)
    shown = with_tools(body, messages, template or "", format, renderer)
    variables = _variables(body, template or "")
    ids = renderer.chat(
        shown.messages,
        template=defaults.chat_template,
        variables={**(defaults.chat_template_kwargs or {}), **variables.values},
        continue_final_message=body.continue_final_message,
        add_generation_prompt=body.opens_answer,
        tools=shown.variables,
        tool_format=format,
    )
    answers = answer_format(body, ids, renderer, template, format)
    return Prompts([ids], renderer, "messages", answers, unused_fields=variables.unused_fields)


def _variables(body: ChatRequest, template: str) -> TemplateVariables:
    """The variables of the template that the request sets, most often none."""
    if not (body.chat_template_kwargs or body.enable_thinking is not None or body.reasoning_effort):
        return TemplateVariables({})
    return requested_variables(
        template, body.chat_template_kwargs, thinking=body.enable_thinking, effort=body.reasoning_effort
    )
