"""``/v1/embeddings``: the mean of the last hidden states over the tokens of a text, of length 1.

Hidden states are those behind the decoder's last norm, with the adapter that ``model`` names, or without one.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from server.adapters.adapter_cache import Lease
from server.api.formats.wire import Json, to_json, to_json_with_encoded_parts
from server.api.generation import acquire, cache_namespace, queue_owner, request_log
from server.api.ignored_fields import note_ignored_fields
from server.api.limits.bodies import BodyRoute
from server.api.protocol import EmbeddingRequest
from server.api.protocol.prompts import Prompt
from server.api.request_log import EndedChoice, EndedRequest
from server.api.responses import cancel_on_disconnect
from server.api.state import ServerState, State
from server.errors import ContextLengthExceeded, InvalidRequest, QueueFull, QueueShareFull
from server.metrics import BASE
from server.sequence import Doubles, SamplingParams, StepOutput
from server.text.prompt import PromptRenderer

MAX_TOKENS = 300_000
"""Tokens of all inputs of a request together, as in OpenAI's API."""
_MOST_AT_ONCE = 16
_PARAMS = SamplingParams(temperature=0, embedding=True)

Vector = NDArray[np.float32]

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, http: Request, state: State) -> Response:
    """An embedding of each input, in their order."""
    await note_ignored_fields(body, http, state)
    work = embed(
        body.input,
        body.model,
        http,
        state,
        user=body.user,
        lora_scale=body.lora_scale,
        dimensions=body.dimensions,
        truncate_to=body.truncate_prompt_tokens,
    )
    embeddings = await cancel_on_disconnect(work, http.receive)
    content = await asyncio.to_thread(_to_json, embeddings, body)
    return Response(content, headers=embeddings.headers, media_type="application/json")


@dataclass(frozen=True)
class Embeddings:
    """A vector of length 1 for each input, their tokens, and the label of the adapter, None for the base."""

    vectors: list[Vector]
    num_tokens: int
    adapter: str | None

    @property
    def headers(self) -> dict[str, str]:
        """Which adapter the vectors are of."""
        return {} if self.adapter is None else {"x-quickchange-adapter": self.adapter}


async def embed(
    inputs: Sequence[Prompt],
    model: str,
    http: Request,
    state: ServerState,
    *,
    user: str | None = None,
    lora_scale: float | None = None,
    dimensions: int | None = None,
    truncate_to: int | None = None,
    param: str = "input",
) -> Embeddings:
    """Embed texts or token ids. ``param`` is the field of the body that has them.

    ``dimensions`` keeps the first ones, scaled to length 1 again. ``truncate_to`` keeps the last tokens of each input,
    -1 as many as fit. Raises the errors of a lease, ``ContextLengthExceeded``, ``InvalidRequest``, and the engine's.
    """
    _check_dimensions(dimensions, state.base_size.hidden_size)
    state.engine.check_capacity(1, owner=queue_owner(http))
    with ExitStack() as stack:
        lease = await acquire(model, http, state, user=user, lora_scale=lora_scale)
        if lease is not None:
            stack.callback(lease.release)
        limit = state.engine.max_model_len
        ids = await state.prompt_threads.run(http, _tokenize, inputs, _renderer(lease, state), param)
        if truncate_to is not None:
            ids = [each[-(limit if truncate_to < 0 else truncate_to) :] for each in ids]
        _check_lengths(ids, limit, param)
        run = _EmbeddingRun(state, lease, http, ids, dimensions)
        stack.callback(run.write_log)
        vectors = await run.vectors()
        return Embeddings(vectors, sum(map(len, ids)), None if lease is None else lease.label)


def _renderer(lease: Lease | None, state: ServerState) -> PromptRenderer:
    return state.prompts if lease is None else state.prompts.for_adapter(lease.defaults)


def _tokenize(inputs: Sequence[Prompt], renderer: PromptRenderer, param: str) -> list[list[int]]:
    """In a thread: texts as token ids; token ids as they are. It ends once there are too many."""
    ids: list[list[int]] = []
    num_tokens = 0
    for item in inputs:
        ids.append(renderer.prompt_ids(item, param=param))
        num_tokens += len(ids[-1])
        if num_tokens > MAX_TOKENS:
            raise InvalidRequest(
                f"Invalid '{param}': its items have more than {MAX_TOKENS} tokens together; send fewer at once.",
                param=param,
                code="array_above_max_length",
            )
    return ids


def _check_dimensions(dimensions: int | None, most: int) -> None:
    if dimensions is not None and dimensions > most:
        raise InvalidRequest(
            f"Invalid 'dimensions': embeddings of this model have {most}.",
            param="dimensions",
            code="integer_above_max_value",
        )


def _check_lengths(ids: Sequence[Sequence[int]], limit: int, param: str) -> None:
    longest = max(map(len, ids))
    if longest > limit:
        raise ContextLengthExceeded(limit=limit, prompt_tokens=longest, completion_tokens=0, param=param)


class _EmbeddingRun:
    """The sequences of one request: a few at once, so that a request with many inputs leaves room for others."""

    def __init__(
        self,
        state: ServerState,
        lease: Lease | None,
        http: Request,
        ids: Sequence[Sequence[int]],
        dimensions: int | None,
    ) -> None:
        self._state, self._lease, self._http = state, lease, http
        self._owner = http.state.principal.id
        self._namespace = cache_namespace(self._owner, None)
        self._ids, self._dimensions = ids, dimensions
        self._waiting = deque(range(len(ids)))
        self._num_running = 0
        self._found: dict[int, Vector] = {}

    async def vectors(self) -> list[Vector]:
        """The vector of each input. If one fails, or the client is gone, all sequences end."""
        workers = [asyncio.ensure_future(self._work()) for _ in range(min(_MOST_AT_ONCE, len(self._ids)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [self._found[place] for place in range(len(self._ids))]

    def write_log(self) -> None:
        """Metrics, the log line and the span; the whole request is one choice without tokens."""
        lease = self._lease
        finish = "embedding" if len(self._found) == len(self._ids) else "failed"
        ended = EndedRequest(
            adapter=BASE if lease is None else lease.label,
            metrics_label=BASE if lease is None else lease.metrics_label,
            choices=[EndedChoice(finish, 0, 0.0, 0.0, complete=False, loops=False)],
            prompt_tokens=sum(len(self._ids[place]) for place in self._found),
            cached_tokens=0,
            completion_tokens=0,
        )
        request_log(self._http, self._state, "embeddings").write(ended)

    async def _work(self) -> None:
        """One input after another. Where there is no room, the sequences that run already go on alone."""
        while self._waiting:
            place = self._waiting.popleft()
            try:
                hidden_mean = await self._run(self._ids[place])
            except (QueueFull, QueueShareFull):
                if not self._num_running:
                    raise
                self._waiting.append(place)
                return
            self._found[place] = unit_vector(hidden_mean, self._dimensions)

    async def _run(self, ids: Sequence[int]) -> Doubles:
        done: asyncio.Future[Doubles] = asyncio.get_running_loop().create_future()

        def sink(output: StepOutput | Exception) -> None:
            if done.done():
                return
            if isinstance(output, Exception):
                done.set_exception(output)
            elif output.last:
                assert output.embedding is not None
                done.set_result(output.embedding)

        self._state.engine.check_capacity(1, owner=queue_owner(self._http))
        sequence = self._state.engine.submit(
            ids,
            params=_PARAMS,
            max_tokens=0,
            adapters=() if self._lease is None else self._lease.uses,
            eos_ids=frozenset(),
            cache_namespace=self._namespace,
            owner=self._owner,
            sink=sink,
        )
        self._num_running += 1
        try:
            return await done
        finally:
            self._num_running -= 1
            sequence.close()


def unit_vector(hidden_mean: Doubles, dimensions: int | None) -> Vector:
    """The first ``dimensions`` numbers, scaled to length 1."""
    kept = hidden_mean[:dimensions]
    length = float(np.linalg.norm(kept))
    return (kept / length if length else kept).astype(np.float32)


def _to_json(embeddings: Embeddings, body: EmbeddingRequest) -> bytes:
    """In a thread: OpenAI's response, encoded vector by vector, so that other threads run in between."""
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(embeddings.vectors)
    ]
    usage = {"prompt_tokens": embeddings.num_tokens, "total_tokens": embeddings.num_tokens}
    answer: Json = {"object": "list", "data": data, "model": body.model, "usage": usage}
    return to_json_with_encoded_parts(answer)


def _encoded(vector: Vector, encoding_format: str) -> bytes | str:
    """JSON of the numbers, or float32 in little-endian order as base64."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return to_json(vector.tolist()).encode()
