"""What operators and their machines ask: ``/health``, ``/metrics``, ``/version``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response

from server.api.state import State

router = APIRouter()


@router.get("/health")
async def health(state: State) -> Response:
    """200 while the engine lives, else 503."""
    if state.engine.alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "engine stopped"}, status_code=503)


@router.get("/metrics")
async def metrics(http: Request, state: State) -> Response:
    """Prometheus' text, or OpenMetrics for those who accept it."""
    encode, content_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(state.metrics.registry), headers={"content-type": content_type})


@router.get("/version")
async def version(state: State) -> dict[str, str]:
    """The server's version."""
    return {"version": state.version}
