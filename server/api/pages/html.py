"""HTML responses whose policy forbids everything that they do not need themselves."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape

from starlette.responses import HTMLResponse

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 52rem; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: break-word; }
@media (max-width: 30rem) { td:nth-child(2), th:nth-child(2) { display: none; } }
pre { background: #8882; border-radius: .4rem; overflow-x: auto; padding: .7rem; }
code { font: .875em ui-monospace, monospace; }
nav a { margin-right: 1rem; display: inline-block; padding: .2rem 0; }
"""
_NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(title: str, body: str) -> HTMLResponse:
    """A page with ``PAGE_STYLE`` and without scripts; ``body`` is HTML."""
    policy = f"{_NOTHING_ELSE}; style-src '{_digest(PAGE_STYLE)}'"
    return _response(_document(title, f"<style>{PAGE_STYLE}</style>", body), policy)


def scripted_page(title: str, *, head: str, body: str, sources: Mapping[str, str]) -> HTMLResponse:
    """A page with scripts of this server; ``sources`` are the further directives of its policy."""
    policy = "; ".join([_NOTHING_ELSE, *(f"{kind} {source}" for kind, source in sources.items())])
    return _response(_document(title, head, body), policy)


def _document(title: str, head: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _response(document: str, policy: str) -> HTMLResponse:
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(document, headers=headers)
