"""``docs/compatibility.md`` says of every known field of the other APIs what is done with it, and that is done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.api.app import create_app
from server.api.ignored_fields import IGNORED_HEADER
from server.api.protocol import anthropic, ollama, responses
from server.api.protocol.model import RequestModel
from tests.fakes import BASE, FakeEngine, ask, server_state

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MESSAGES = [{"role": "user", "content": "hello"}]
MODELS: dict[str, dict[str, type[RequestModel]]] = {
    "responses": {
        "the body": responses.ResponsesRequest,
        "`message`": responses.InputMessage,
        "its parts": responses.ResponsesText,
        "`function_call`": responses.FunctionCallItem,
        "`function_call_output`": responses.FunctionOutputItem,
        "`reasoning` item": responses.ReasoningItem,
        "`tools`": responses.ResponsesTool,
        "`text`": responses.TextOptions,
        "`reasoning`": responses.ReasoningOptions,
        "`stream_options`": responses.ResponsesStreamOptions,
    },
    "anthropic": {
        "the body": anthropic.MessagesRequest,
        "`messages`": anthropic.AnthropicMessage,
        "`text`": anthropic.TextBlock,
        "`thinking` block": anthropic.ThinkingBlock,
        "`redacted_thinking`": anthropic.RedactedThinkingBlock,
        "`tool_use`": anthropic.ToolUseBlock,
        "`tool_result`": anthropic.ToolResultBlock,
        "`tools`": anthropic.AnthropicTool,
        "`tool_choice`": anthropic.AnthropicToolChoice,
        "`thinking`": anthropic.ThinkingOptions,
        "`output_config`": anthropic.OutputOptions,
        "`metadata`": anthropic.MessagesMetadata,
    },
    "ollama": {
        "`/api/chat`": ollama.OllamaChatRequest,
        "`/api/generate`": ollama.OllamaGenerateRequest,
        "`options`": ollama.OllamaOptions,
        "`messages`": ollama.OllamaMessage,
        "`tool_calls`": ollama.OllamaCall,
        "`function`": ollama.OllamaFunction,
        "`/api/embed`": ollama.OllamaEmbedRequest,
        "`/api/embeddings`": ollama.OllamaEmbeddingsRequest,
        "`/api/show`": ollama.OllamaShowRequest,
    },
}
BODIES: dict[str, tuple[str, type[RequestModel], dict[str, Any]]] = {
    "responses": ("/v1/responses", responses.ResponsesRequest, {"model": BASE, "input": "hello"}),
    "messages": ("/v1/messages", anthropic.MessagesRequest, {"model": BASE, "max_tokens": 9, "messages": MESSAGES}),
    "chat": ("/api/chat", ollama.OllamaChatRequest, {"model": BASE, "messages": MESSAGES, "stream": False}),
    "generate": ("/api/generate", ollama.OllamaGenerateRequest, {"model": BASE, "prompt": "hello", "stream": False}),
}


def row(name: str, model: type[RequestModel]) -> str:
    honoured = ", ".join(f"`{field}`" for field in sorted(model.model_fields) if field != "thread")
    without_effect = ", ".join(f"`{field}`" for field in sorted(model.ignored))
    refused = ", ".join(refusal(field, values) for field, values in sorted(model.neutral.items()))
    return f"| {name} | {honoured} | {without_effect} | {refused} |"


def refusal(field: str, values: tuple[Any, ...]) -> str:
    return f"`{field}`" + (f" (`{' or '.join(map(json.dumps, values))}`)" if values else "")


def table(api: str) -> str:
    rows = [row(name, model) for name, model in MODELS[api].items()]
    return "\n".join(["| | honoured | no effect | refused |", "|---|---|---|---|", *rows])


@pytest.mark.parametrize("api", MODELS)
def test_the_page_has_a_row_for_each_object(api: str) -> None:
    found = re.search(f"<!-- {api} -->\n(.*?)<!-- /{api} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None and found[1].strip() == table(api)


def fields(kind: str) -> list[tuple[str, str]]:
    return [(name, field) for name, (_, model, _) in BODIES.items() for field in sorted(getattr(model, kind))]


@pytest.mark.parametrize(("name", "field"), fields("ignored"))
def test_a_field_without_effect_is_named_in_the_response(name: str, field: str) -> None:
    url, _, body = BODIES[name]
    response = ask(create_app(server_state(FakeEngine())), "POST", url, json={**body, field: {"any": "thing"}})
    assert response.status_code == 200
    assert response.headers[IGNORED_HEADER] == field


@pytest.mark.parametrize(("name", "field"), fields("neutral"))
def test_a_field_that_is_refused_is_refused_but_for_its_neutral_values(name: str, field: str) -> None:
    url, model, body = BODIES[name]
    app = create_app(server_state(FakeEngine()))
    refused = ask(app, "POST", url, json={**body, field: {"any": "thing"}})
    assert refused.status_code == 400
    assert f"'{field}'" in json.dumps(refused.json())
    for value in model.neutral[field]:
        assert ask(app, "POST", url, json={**body, field: value}).status_code == 200
