"""Which methods a path has, which known path was meant by an unknown one, HEAD, and slashes at the end of a path."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_SEGMENTS, MAX_PATH_CHARS = 16, 512
"""Of an unknown path for which a known one is looked up."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class RouteTable:
    """The routes of an application."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]

    def methods(self, path: str) -> list[str]:
        """The methods that a path has; HEAD where it has GET."""
        found = {method for route in self._matching(path) for method in route.methods or ()}
        return [method for method in _METHODS if method in found or (method == "HEAD" and "GET" in found)]

    def meant_by(self, path: str) -> str | None:
        """The known path whose end an unknown path has, such as ``/v1/models`` for ``/models`` or ``/v1/v1/models``."""
        segments = path[:MAX_PATH_CHARS].strip("/").split("/")[:MAX_SEGMENTS]
        for first in range(len(segments)):
            end = "/".join(segments[first:])
            for candidate in (f"/v1/{end}", f"/{end}"):
                for route in self._matching(candidate):
                    return route.path.replace(":path}", "}")
        return None

    def _matching(self, path: str) -> list[Route]:
        """The routes of a path; of those, the ones that say most of it, as ``/v1/models/x/pin`` is no model's name."""
        found = [route for route in self._routes if route.path_regex.match(path)]
        depth = max((route.path.count("/") for route in found), default=0)
        return [route for route in found if route.path.count("/") == depth]


class RoutingMiddleware:
    """Serves HEAD as GET without a body, and a path with slashes at its end as the path without them.

    It comes before whatever judges a path, so that a path has one meaning everywhere.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        if path != scope["path"]:
            scope = {**scope, "path": path}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
