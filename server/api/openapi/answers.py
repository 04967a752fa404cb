"""Successful answers as models for ``/openapi.json``; the server writes its JSON without them.

Fields that may be absent have a default. Further fields are possible everywhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class TokenDetails(BaseModel):
    """Parts of a count of tokens."""

    cached_tokens: int = 0
    reasoning_tokens: int = 0


class TokenUsage(BaseModel):
    """Tokens of a request; ``cached_tokens`` are those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails | None = None
    completion_tokens_details: TokenDetails | None = None


class CalledFunction(BaseModel):
    """A function and its arguments, JSON in a string."""

    name: str
    arguments: str


class FunctionToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[FunctionToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TokenUsage


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class Response(BaseModel):
    """The answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: Any
    metadata: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    temperature: float | None
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    usage: dict[str, Any] | None = None


class Embedding(BaseModel):
    """The vector of one input: numbers, or float32 in little endian as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """The answer of ``/v1/embeddings``."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: dict[str, Any]


class Tokens(BaseModel):
    """The answer of ``/tokenize``."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizedText(BaseModel):
    """The answer of ``/detokenize``."""

    prompt: str


class ServedModel(BaseModel):
    """A model of ``/v1/models``: the base, whose ``parent`` is null, an adapter or an alias."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    context_length: int


class ServedModels(BaseModel):
    """The answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ServedModel]


class DeletedModel(BaseModel):
    """The answer of ``DELETE /v1/models/{model}``."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class LoadedAdapter(BaseModel):
    """The answer of the endpoints that load and unload an adapter."""

    message: str
    adapter: str | None = None


class PinnedModel(BaseModel):
    """The answer of the endpoints that pin a model."""

    id: str
    pinned: str | None


class AnthropicAnswer(BaseModel):
    """The answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class TokenCount(BaseModel):
    """The answer of ``/v1/messages/count_tokens``."""

    input_tokens: int


class OllamaTurnAnswer(BaseModel):
    """The answer of ``/api/chat`` and ``/api/generate``; a line each of a stream."""

    model: str
    created_at: str
    done: bool


class OllamaVectorsAnswer(BaseModel):
    """The answer of ``/api/embed``."""

    model: str
    embeddings: list[list[float]]


class OllamaVectorAnswer(BaseModel):
    """The answer of ``/api/embeddings``."""

    embedding: list[float]


class OllamaModelsAnswer(BaseModel):
    """The answer of ``/api/tags`` and ``/api/ps``."""

    models: list[dict[str, Any]]


class OllamaModelAnswer(BaseModel):
    """The answer of ``/api/show``."""

    details: dict[str, Any]
    model_info: dict[str, Any]


class HealthStatus(BaseModel):
    """The answer of the probes."""

    status: str


class ServerVersion(BaseModel):
    """The answer of ``/version`` and ``/api/version``."""

    version: str


class OpenAPIDocument(BaseModel):
    """The answer of ``/openapi.json``."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
