"""The application: routes, error handlers and middleware.

An endpoint is a module with a ``router``, which ``create_app`` includes.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import Lifespan

from server.api import (
    admin,
    anthropic,
    chat,
    completions,
    embeddings,
    models,
    ollama,
    ollama_models,
    operations,
    responses_api,
    tokens,
)
from server.api.auth.middleware import AuthMiddleware
from server.api.cors import CorsMiddleware
from server.api.encoded_bodies import EncodedBodyMiddleware
from server.api.errors import install_error_handlers
from server.api.hosts import HostMiddleware
from server.api.lifecycle import DrainMiddleware
from server.api.limits.bodies import BodyReader
from server.api.middleware import MAX_BODY_BYTES, RequestMiddleware
from server.api.pages import overview, reference
from server.api.routing import RouteTable, RoutingMiddleware
from server.api.state import ServerState

ROUTERS = (
    chat.router,
    completions.router,
    embeddings.router,
    responses_api.router,
    tokens.router,
    anthropic.router,
    ollama.router,
    ollama_models.router,
    models.router,
    admin.router,
    operations.router,
    overview.router,
    reference.router,
)


def create_app(state: ServerState, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The ASGI application over an engine, which ``lifespan`` may start and stop.

    FastAPI's documentation pages are off, because they load scripts from the internet; ``pages`` has our own.
    """
    app = FastAPI(
        title="Quickchange",
        version=state.version,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.server = state
    app.state.routes = RouteTable([route for router in ROUTERS for route in router.routes])
    app.state.openapi_documents = {}
    app.state.bodies = BodyReader(state.engine)
    install_error_handlers(app)
    app.add_middleware(EncodedBodyMiddleware, max_body_bytes=MAX_BODY_BYTES)
    app.add_middleware(AuthMiddleware, access=state.access, metrics=state.metrics)
    app.add_middleware(DrainMiddleware, lifecycle=state.lifecycle)
    app.add_middleware(RoutingMiddleware)
    app.add_middleware(HostMiddleware, hosts=state.access.hosts)
    app.add_middleware(RequestMiddleware, metrics=state.metrics)
    app.add_middleware(CorsMiddleware, origins=state.access.origins)
    for router in ROUTERS:
        app.include_router(router)
    return app
