"""``/tokenize`` and ``/detokenize``, as vLLM has them: texts and conversations to token ids, and back.

``model`` chooses the adapter's added tokens and chat template. Its weights are not loaded.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chat import render_prompt
from server.api.formats.wire import Json, to_json_with_encoded_parts
from server.api.generation import named_defaults
from server.api.ignored_fields import note_ignored_fields
from server.api.limits.bodies import BodyRoute, by_size
from server.api.protocol.tokens import DetokenizeRequest, TokenizeRequest
from server.api.state import ServerState, State
from server.api.translation import chat_request
from server.errors import InvalidRequest
from server.text.prompt import PromptRenderer

router = APIRouter(route_class=BodyRoute)


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(body: TokenizeRequest, http: Request, state: State) -> Response:
    """The token ids of a text, or of the prompt that a conversation is rendered to."""
    await note_ignored_fields(body, http, state)
    if body.messages is None:
        renderer = await _renderer(body.model, http, state)
        ids = await state.prompt_threads.run(http, _text_ids, body, renderer)
    else:
        fields = {"model": body.model or state.base_name, "messages": body.messages, **body.chat_fields}
        prompts = await render_prompt(await by_size(http, chat_request, fields), http, state)
        renderer, ids = prompts.renderer, prompts.ids[0]
    answer: Json = {"count": len(ids), "max_model_len": state.engine.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(renderer.token_names, ids)
    return await _respond(answer)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeRequest, http: Request, state: State) -> Response:
    """The text of token ids, special tokens included."""
    await note_ignored_fields(body, http, state)
    renderer = await _renderer(body.model, http, state)
    if body.tokens and max(body.tokens) >= renderer.vocab_size:
        raise InvalidRequest(f"Invalid 'tokens': ids should be below {renderer.vocab_size}.", param="tokens")
    return await _respond({"prompt": await asyncio.to_thread(renderer.decode_all, body.tokens)})


async def _renderer(model: str | None, http: Request, state: ServerState) -> PromptRenderer:
    if model is None:
        return state.prompts
    defaults = await named_defaults(model, http, state)
    return await asyncio.to_thread(state.prompts.for_adapter, defaults)


def _text_ids(body: TokenizeRequest, renderer: PromptRenderer) -> list[int]:
    assert body.prompt is not None
    return renderer.text_ids(body.prompt, add_special_tokens=body.add_special_tokens is not False)


async def _respond(answer: Json) -> Response:
    """JSON, which may be long, from a thread."""
    return Response(await asyncio.to_thread(to_json_with_encoded_parts, answer), media_type="application/json")
