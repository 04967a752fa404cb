"""The application: its routes, error handlers and middleware, and what operators and their machines ask.

An endpoint is a module with a ``router``, and its name in ``create_app``.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response
from starlette.types import Lifespan

from server.api import admin, completions, models
from server.api.errors import install_error_handlers
from server.api.middleware import RequestMiddleware
from server.api.state import ServerState, State

__all__ = ["ServerState", "create_app"]

operations = APIRouter()


def create_app(state: ServerState, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The ASGI application over an engine, which ``lifespan`` may start and stop.

    No documentation pages: FastAPI's load scripts from elsewhere.
    """
    app = FastAPI(title="Quickchange", version=state.version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = state
    install_error_handlers(app)
    app.add_middleware(RequestMiddleware, metrics=state.metrics)
    for router in (completions.router, models.router, admin.router, operations):
        app.include_router(router)
    return app


@operations.get("/health")
async def health(state: State) -> Response:
    """200 while the engine lives, else 503."""
    if state.engine.alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "engine stopped"}, status_code=503)


@operations.get("/metrics")
async def metrics(http: Request, state: State) -> Response:
    """Prometheus' text, or OpenMetrics for those who accept it."""
    encode, content_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(state.metrics.registry), headers={"content-type": content_type})


@operations.get("/version")
async def version(state: State) -> dict[str, str]:
    """The server's version."""
    return {"version": state.version}
