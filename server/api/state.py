"""The state of a running server, built once at start-up, which endpoints get from the application."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from fastapi import Depends, Request

from server.adapters.adapter_library import AdapterLibrary
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.model_names import MayUse
from server.adapters.operator import AdapterOperator
from server.api.auth.access import Access
from server.api.auth.principal import Principal
from server.api.lifecycle import Lifecycle
from server.api.limits.bodies import PromptThreads
from server.api.tracing import RequestTracer
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.text.grammar.compiler import GrammarCompiler
from server.text.prompt import PromptRenderer

PingMode = Literal["comment", "delta", "off"]
"""What a stream sends while there is no output."""


class BaseSize(NamedTuple):
    """The size of the base's weights in memory and of its hidden states, and the number format of its linear layers."""

    num_parameters: int
    num_bytes: int
    hidden_size: int
    number_format: str


@dataclass(frozen=True)
class ServerState:
    """The parts of a running server.

    ``computation`` names the base's weights and how they are computed. ``base_defaults`` come from the base's
    generation config; ``operator`` changes adapters for keys of scope admin.
    With ``strict_fields``, a request with an unknown field is refused.
    """

    created: int
    prompts: PromptRenderer
    engine: AsyncEngine
    adapters: AdapterLibrary
    metrics: Metrics
    default_max_tokens: int
    eos_ids: frozenset[int]
    version: str
    computation: str
    base_size: BaseSize
    base_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    operator: AdapterOperator | None = None
    strict_fields: bool = False
    tracer: RequestTracer | None = None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    access: Access = field(default_factory=Access)
    sse_ping: PingMode = "comment"
    prompt_threads: PromptThreads = field(default_factory=PromptThreads)
    grammars: GrammarCompiler = field(default_factory=GrammarCompiler)

    @property
    def base_name(self) -> str:
        return self.adapters.names.base_name


async def _state_of(request: Request) -> ServerState:  # async: FastAPI calls other functions in a thread
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


State = Annotated[ServerState, Depends(_state_of)]


def adapter_access(request: Request) -> MayUse:
    """Which adapters exist for the key of a request."""
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal.may_use


async def _access_of(request: Request) -> MayUse:
    return adapter_access(request)


UsableAdapters = Annotated[MayUse, Depends(_access_of)]
