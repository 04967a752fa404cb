"""Request bodies and their prompts: the large ones wait for each other, and nobody waits for them.

A large body is judged by its size first, then parsed and validated in a thread, one at a time. A body of a few
kilobytes is parsed in the event loop, which takes less time than handing it over.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.api.errors import ClientGone
from server.engine.async_engine import AsyncEngine
from server.errors import BodyTooLarge, ServerOverloaded

P = ParamSpec("P")
T = TypeVar("T")
CountBytes = Callable[[int], None]
"""Told the size of a body so far; raises ``ServerOverloaded`` if there are too many bytes of large bodies."""

LARGE_BODY = 16 * 1024
"""Bytes from which a body is parsed and validated in a thread."""
MAX_LARGE_BYTES = 64 * 1024 * 1024
"""Bytes of large bodies that are read or validated at the same time."""
BODY_SECONDS = 60.0
"""Time in which a body must arrive."""
LONG_PROMPT = 64 * 1024
"""Bytes of a body whose prompt is a long one."""
MAX_DEPTH = 64
_MOST_VALIDATED = 2
"""Large bodies between validation and the end of rendering: objects take ten times the memory of their JSON."""
_FIELDS_PER_TOKEN = 4
_MIN_FIELDS = 16_384


class BodyReader:
    """Parses and validates large bodies within limits that follow from the engine's ``max_model_len``.

    A message is at least one token of the prompt, so that a body with many more fields than the context has tokens
    cannot be answered.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._num_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self.turns = asyncio.Semaphore(_MOST_VALIDATED)

    @property
    def max_fields(self) -> int:
        """Most fields, and most objects and arrays, of a large body."""
        return max(_MIN_FIELDS, _FIELDS_PER_TOKEN * self._engine.max_model_len)

    @contextlib.contextmanager
    def room(self) -> Iterator[CountBytes]:
        """Room for a body while it is read and validated, as the size that it is known to have grows."""
        counted = 0

        def count(num_bytes: int) -> None:
            nonlocal counted
            more = num_bytes - counted
            if num_bytes <= LARGE_BODY or more <= 0:
                return
            if self._num_bytes + more > MAX_LARGE_BYTES:
                raise ServerOverloaded("The server is reading too many large requests. Try again in a moment.")
            self._num_bytes += more
            counted = num_bytes

        try:
            yield count
        finally:
            self._num_bytes -= counted

    async def validate(self, data: bytes, validate: Callable[[Any], Any]) -> tuple[Any, Any]:
        """The JSON of a body and what it is validated to."""
        return await self.run(self._validate, data, validate)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of ``function``, by the thread that all large bodies wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _validate(self, data: bytes, validate: Callable[[Any], Any]) -> tuple[Any, Any]:
        num_fields = data.count(b'":') - data.count(b'\\":')  # a quote in a string is escaped
        if num_fields > self.max_fields:
            raise BodyTooLarge(f"{num_fields} fields", f"{self.max_fields} fields")
        body = json.loads(data)
        self._check_structure(body)
        return body, validate(body)

    def _check_structure(self, body: object) -> None:
        """Raises ``BodyTooLarge`` for too many objects and arrays, or too deep a nesting."""
        level: list[object] = [body]
        depth, num_containers = 0, 0
        while level:
            num_containers += len(level)
            if num_containers > self.max_fields:
                limit = f"{self.max_fields} objects and arrays"
                raise BodyTooLarge(f"more than {limit}", limit)
            if depth > MAX_DEPTH:
                raise BodyTooLarge(f"more than {MAX_DEPTH} levels of nesting", f"{MAX_DEPTH} levels")
            level = [item for value in level for item in _items(value) if isinstance(item, dict | list)]
            depth += 1


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class PromptThreads:
    """Four threads for prompts of short bodies, and one for those of long ones."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(4, thread_name_prefix="prompts")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long prompts")

    async def run(self, http: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``function``, in the thread for the size of the request's body; it ends a large body's turn."""
        is_long = getattr(http.state, "body_bytes", 0) > LONG_PROMPT
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._long if is_long else self._short, lambda: context.run(function, *args, **kwargs)
            )
        finally:
            if hasattr(http.state, "large_body"):
                await http.state.large_body.aclose()


class BodyRoute(APIRoute):
    """A route whose body is read within limits. FastAPI takes an instance of the body's model over as it is."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        if field is None:
            return handle

        def validate(raw: Any) -> Any:
            value, errors = field.validate(raw, {}, loc=("body",))
            if errors:
                raise RequestValidationError(errors)
            return value

        async def handle_bounded(request: Request) -> Response:
            reader: BodyReader = request.app.state.bodies
            async with contextlib.AsyncExitStack() as stack:
                with reader.room() as count:
                    data = await _read(request, count)
                    request.state.body_bytes = len(data)
                    if len(data) > LARGE_BODY:
                        await stack.enter_async_context(reader.turns)
                        request.state.large_body = stack
                        request.state.raw_body, request._json = await _parsed(reader, data, validate)
                        request._body = b"{}"  # only its JSON is used from here on
                return await handle(request)

        return handle_bounded


async def raw_body(request: Request) -> Any:
    """The JSON of the body of a request to a ``BodyRoute``."""
    if hasattr(request.state, "raw_body"):
        return request.state.raw_body
    return await request.json()


async def by_size(request: Request, function: Callable[..., T], *args: Any) -> T:
    """The result of work on the body of a request: in the thread of large bodies if it is one, else at once."""
    if getattr(request.state, "body_bytes", 0) <= LARGE_BODY:
        return function(*args)
    reader: BodyReader = request.app.state.bodies
    return await reader.run(function, *args)


async def _parsed(reader: BodyReader, data: bytes, validate: Callable[[Any], Any]) -> tuple[Any, Any]:
    try:
        return await reader.validate(data, validate)
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "", "input": {}}
        raise RequestValidationError([detail | {"ctx": {"error": error.msg}}], body=error.doc) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, RequestValidationError):
            raise
        raise HTTPException(400) from None


async def _read(request: Request, count: CountBytes) -> bytes:
    """The body, of which only some requests announce the length: not those in chunks or compressed."""
    length = request.headers.get("content-length", "")
    if length.isdecimal():
        count(int(length[:20]))
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                count(len(data))
    except TimeoutError:
        raise HTTPException(408, headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    request._body = bytes(data)
    return request._body
