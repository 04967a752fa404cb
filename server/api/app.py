"""The application: routes, error handlers, and the one middleware around them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import Lifespan

from server.api import admin, chat, completions, models, ops
from server.api.boundary import Boundary
from server.api.errors import install_error_handlers
from server.api.state import ServerState

__all__ = ["ServerState", "create_app"]


def create_app(state: ServerState, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The ASGI application over an engine, which ``lifespan`` may start and stop.

    No documentation pages: FastAPI's load scripts from elsewhere.
    """
    app = FastAPI(title="Quickchange", version=state.version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = state
    install_error_handlers(app)
    app.add_middleware(Boundary, metrics=state.metrics)
    for part in (chat, completions, models, admin, ops):
        app.include_router(part.router)
    return app
