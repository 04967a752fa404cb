"""``/openapi.json``, and its readers ``/docs`` (Swagger UI) and ``/redoc`` (ReDoc), whose files the package has."""

from __future__ import annotations

import asyncio
import gzip
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from server.api.openapi.document import openapi_document
from server.api.pages.html import scripted_page
from server.api.state import State

router = APIRouter()

_FOLDER = Path(__file__).parent / "assets"
MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-start.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
}


@router.get("/openapi.json")
async def openapi(http: Request, state: State) -> dict[str, Any]:
    """This document."""
    needs_key = not state.access.keys.is_open
    documents: dict[bool, dict[str, Any]] = http.app.state.openapi_documents
    if needs_key not in documents:
        documents[needs_key] = await asyncio.to_thread(openapi_document, http.app, needs_key=needs_key)
    return documents[needs_key]


@router.get("/docs", response_class=HTMLResponse)
async def swagger() -> HTMLResponse:
    """The API in Swagger UI."""
    return scripted_page(
        "Quickchange: API",
        head='<link rel="stylesheet" href="assets/swagger-ui.css">',
        body='<div id="ui"></div>\n<script src="assets/swagger-ui-bundle.js"></script>\n'
        '<script src="assets/swagger-start.js"></script>',
        sources={
            "script-src": "'self'",
            "style-src": "'self' 'unsafe-inline'",
            "img-src": "'self' data:",
            "connect-src": "'self'",
        },
    )


@router.get("/redoc", response_class=HTMLResponse)
async def redoc() -> HTMLResponse:
    """The API in ReDoc."""
    return scripted_page(
        "Quickchange: API",
        head="",
        body='<redoc spec-url="openapi.json"></redoc>\n<script src="assets/redoc.standalone.js"></script>',
        sources={
            "script-src": "'self'",
            "style-src": "'unsafe-inline'",
            "img-src": "'self' data:",
            "connect-src": "'self'",
            "worker-src": "blob:",
        },
    )


@router.get("/assets/{name}")
async def asset(name: str, http: Request) -> Response:
    """A script or style of these pages."""
    if name not in MEDIA_TYPES:
        raise HTTPException(404)
    headers = {"cache-control": "public, max-age=86400", "vary": "accept-encoding", "x-content-type-options": "nosniff"}
    content = _compressed(name)
    if "gzip" in http.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
    else:
        content = gzip.decompress(content)
    return Response(content, headers=headers, media_type=MEDIA_TYPES[name])


@cache
def _compressed(name: str) -> bytes:
    path = _FOLDER / f"{name}.gz"
    return path.read_bytes() if path.exists() else gzip.compress((_FOLDER / name).read_bytes())
