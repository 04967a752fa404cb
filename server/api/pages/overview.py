"""``/``: what runs here, its models, and commands to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from html import escape

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from server.adapters.model_names import MayUse
from server.api.auth.principal import AccessScope
from server.api.models import state_of
from server.api.pages.html import page
from server.api.state import ServerState, State, UsableAdapters

router = APIRouter()

MAX_ROWS = 200
_LINKS = (
    ("docs", "API (Swagger UI)"),
    ("redoc", "API (ReDoc)"),
    ("openapi.json", "OpenAPI"),
    ("v1/models", "Models"),
    ("metrics", "Metrics"),
    ("health", "Health"),
)


@router.get("/", response_class=HTMLResponse)
async def overview(http: Request, state: State, may_use: UsableAdapters) -> HTMLResponse:
    """What runs here, for people."""
    may_infer = http.state.principal.allows(AccessScope.INFER)
    needs_key = not state.access.keys.is_open
    links = "\n".join(f'<a href="{path}">{escape(text)}</a>' for path, text in _LINKS)
    parts = [f"<h1>Quickchange {escape(state.version)}</h1>"]
    if may_infer:
        parts.append(
            f"<p>Base <code>{escape(state.base_name)}</code>, a context of {state.engine.max_model_len} tokens.</p>"
        )
    parts.append(f"<nav>{links}</nav>")
    parts += _models(state, may_use) if may_infer else ["<p>Models are shown to requests with a key.</p>"]
    parts += _commands(http, state, needs_key=needs_key) if may_infer else []
    return page("Quickchange", "\n".join(parts))


def _models(state: ServerState, may_use: MayUse) -> Iterator[str]:
    yield "<h2>Models</h2>\n<table>\n<tr><th>model</th><th>kind</th><th>version</th><th>state</th></tr>"
    rows = list(_rows(state, may_use))
    for cells in rows[:MAX_ROWS]:
        name, *others = map(escape, cells)
        yield f"<tr><td><code>{name}</code></td>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"
    yield "</table>"
    if len(rows) > MAX_ROWS:
        yield f'<p>{len(rows) - MAX_ROWS} more are in <a href="v1/models">/v1/models</a>.</p>'


def _rows(state: ServerState, may_use: MayUse) -> Iterator[tuple[str, str, str, str]]:
    """Name, kind, version and state of each model that the key may use."""
    yield state.base_name, "base", "", ""
    for entry in state.adapters.registry:
        if may_use(entry.name):
            version = "" if entry.served is None else entry.served.label.rpartition("@")[2]
            yield entry.name, "adapter", version, state_of(entry.served, state)
    for alias in state.adapters.names.visible_aliases(may_use):
        yield alias.name, "alias", ", ".join(target.model for target in alias.targets), ""


def _commands(http: Request, state: ServerState, *, needs_key: bool) -> Iterator[str]:
    """Commands for a shell. The server's address is the one that the browser used."""
    base_url = str(http.base_url).rstrip("/")
    key = ' -H "Authorization: Bearer $API_KEY"' if needs_key else ""
    adapters = [entry.name for entry in state.adapters.registry if http.state.principal.may_use(entry.name)]
    model = adapters[0] if adapters else state.base_name
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    yield "<h2>Commands</h2>"
    for title, path, data in (
        ("A chat", "/v1/chat/completions", body),
        ("The same, streamed", "/v1/chat/completions", {**body, "stream": True}),
        ("All models", "/v1/models", None),
    ):
        command = f"curl {shlex.quote(base_url + path)}{key}"
        if data is not None:
            text = shlex.quote(json.dumps(data, ensure_ascii=False))
            command += f" \\\n  -H 'Content-Type: application/json' \\\n  -d {text}"
        yield f"<p>{title}:</p>\n<pre><code>{escape(command)}</code></pre>"
    yield f"<p>Clients of OpenAI's API take the base URL <code>{escape(base_url)}/v1</code>.</p>"
