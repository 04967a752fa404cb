"""Endpoints for operators: probes, metrics, version. Probes read flags only, so that they answer under full load."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response

from server.api.state import State

MAX_STEP_SECONDS = 600.0
"""An engine step that takes longer is taken for a hanging one. Long prompts on slow CPUs need tens of seconds."""

router = APIRouter()


@router.get("/livez")
async def livez(state: State) -> Response:
    """200 while the engine lives and moves on, else 503: then only a restart helps."""
    if not state.engine.alive and not state.lifecycle.draining:
        return _probe(503, "engine stopped")
    if state.engine.step_seconds > MAX_STEP_SECONDS:
        return _probe(503, "engine hangs")
    return _probe(200, "ok")


@router.get("/readyz")
async def readyz(state: State) -> Response:
    """200 while requests are taken, else 503."""
    if state.lifecycle.draining:
        return _probe(503, "shutting down")
    return _probe(200, "ok") if state.engine.alive else _probe(503, "engine stopped")


@router.get("/startupz")
async def startupz(state: State) -> Response:
    """200 once the base is loaded and the adapters are read. Before, nothing listens on the port."""
    return _probe(200, "ok") if state.lifecycle.started else _probe(503, "starting")


@router.get("/health")
async def health(state: State) -> Response:
    """The same as ``/readyz``."""
    return await readyz(state)


@router.get("/metrics")
async def metrics(http: Request, state: State) -> Response:
    """Prometheus' text format, or OpenMetrics if the client accepts it."""
    encode, content_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(state.metrics.registry), headers={"content-type": content_type})


@router.get("/version")
async def version(state: State) -> dict[str, str]:
    """The server's version."""
    return {"version": state.version}


def _probe(status: int, text: str) -> Response:
    return JSONResponse({"status": text}, status)
