"""Leases of adapters, and their weights in memory within a budget of bytes. The event loop owns it: no locks.

Weights that are leased or pinned are never evicted; the others are, least recently used first. A load reserves an upper
bound of its bytes, which becomes what the weights really take once they are loaded. Requests whose weights find no room
wait in a queue, first come, first served. Weights in memory are leased at once, past the queue, unless its first
request has waited ``MAX_QUEUE_SECONDS`` for room that this would keep taken.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.registry import Adapter
from server.errors import QueueFull
from server.integrity import ensure
from server.metrics import COMPOSITION
from server.sequence import LoRARequest

MAX_QUEUE_SECONDS = 1.0
"""Seconds after which the first in the queue goes before requests whose weights are in memory."""

Load = Callable[[str], Awaitable[int]]
"""Loads weights by their digest; returns the bytes that they take."""


@dataclass(frozen=True)
class LeasedAdapter:
    """A version of an adapter in memory, and the factor of its delta."""

    adapter: Adapter
    scale: float = 1.0

    @property
    def label(self) -> str:
        """``name@digest``, with the factor where it is not 1."""
        return self.adapter.label if self.scale == 1 else f"{self.adapter.label}:{self.scale:g}"


@dataclass(eq=False)
class Lease:
    """Adapters that stay in memory until ``release``."""

    adapters: tuple[LeasedAdapter, ...]
    _release: Callable[[], None]

    @property
    def uses(self) -> tuple[LoRARequest, ...]:
        return tuple(LoRARequest(leased.adapter.weights_digest, leased.scale) for leased in self.adapters)

    @property
    def label(self) -> str:
        """``name@digest``, joined by ``+`` where there are several; it can be asked for as a model."""
        return "+".join(leased.label for leased in self.adapters)

    @property
    def metrics_label(self) -> str:
        """The adapter's name; compositions are counted under one name together."""
        return self.adapters[0].adapter.name if len(self.adapters) == 1 else COMPOSITION

    @property
    def defaults(self) -> GenerationDefaults:
        """The generation defaults of the first adapter, with the stop strings, end tokens and added tokens of all."""
        defaults = [one.adapter.defaults for one in self.adapters]
        stop = dict.fromkeys(text for one in defaults for text in one.stop)
        eos = dict.fromkeys(token for one in defaults for token in one.eos)
        ends = dict.fromkeys(token for one in defaults for token in one.end_tokens)
        added = next((one.added_tokens for one in defaults if one.added_tokens), ())
        return replace(defaults[0], stop=tuple(stop), eos=tuple(eos), end_tokens=tuple(ends), added_tokens=added)

    def release(self) -> None:
        """Give it back; once."""
        self._release()


class Loaded(NamedTuple):
    """Weights in the engine: how far they move the base, and the bytes that they take."""

    delta_norm: float
    num_bytes: int


@dataclass(eq=False)
class _Ticket:
    """A request in the queue: it needs room for all of ``needs``, bytes by digest."""

    needs: Mapping[str, int]
    load: Load
    since: float
    admitted: asyncio.Future[list[asyncio.Task[None]]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class AdapterCache:
    """Bytes by weights digest, leases and pins.

    ``unload(digest)`` frees weights; ``is_wanted(digest)`` says whether they can still be asked for. ``num_bytes``
    counts weights in memory and those being loaded; at most ``max_waiting`` requests wait for room. Idle weights leave
    ``spare`` of the ``max_bytes`` free, for other memory of adapters; leased weights may take it.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        unload: Callable[[str], None],
        is_wanted: Callable[[str], bool],
        max_waiting: int = 256,
        spare: int = 0,
    ) -> None:
        self.max_bytes, self.max_waiting, self.spare = max_bytes, max_waiting, spare
        self.num_bytes = 0
        self.num_evicted = 0
        self._unload, self._is_wanted = unload, is_wanted
        self._bytes: OrderedDict[str, int] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._leases: Counter[str] = Counter()
        self._pinned: frozenset[str] = frozenset()
        self._queue: deque[_Ticket] = deque()

    @property
    def digests(self) -> list[str]:
        """What is in memory, least recently used first."""
        return [digest for digest in self._bytes if digest not in self._loading]

    def __contains__(self, digest: str) -> bool:
        """Whether weights are in memory or being loaded."""
        return digest in self._bytes

    def state(self, digest: str) -> str | None:
        """``resident``, ``loading``, or None."""
        if digest not in self._bytes:
            return None
        return "loading" if digest in self._loading else "resident"

    def num_leases(self, digest: str) -> int:
        """Requests that use these weights, or wait until they are loaded."""
        return self._leases[digest]

    @property
    def pinned(self) -> frozenset[str]:
        return self._pinned

    def pin(self, digests: Iterable[str]) -> None:
        """Replace the pins: weights of these digests are not evicted."""
        before, self._pinned = self._pinned, frozenset(digests)
        for digest in before - self._pinned:
            self.drop_unwanted(digest)
        self._admit()

    async def hold(self, needs: Mapping[str, int], load: Load) -> None:
        """Lease weights, all or none: wait for room, load what is missing.

        Raises ``QueueFull``, and what ``load`` raises.
        """
        loading = await self._reserve(needs, load)
        try:
            for task in loading:
                await asyncio.shield(task)
        except BaseException:
            self.release(needs)
            raise

    def has_room(self, num_bytes: int) -> bool:
        return not self._queue and self._immovable({}) + num_bytes <= self.max_bytes

    def release(self, digests: Iterable[str]) -> None:
        """Return leases; weights that cannot be asked for any more are freed at once."""
        for digest in digests:
            ensure(self._leases[digest] > 0, "released more often than leased")
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
            self.drop_unwanted(digest)
        self._admit()

    def drop_unwanted(self, digest: str) -> None:
        """Free weights that are idle and cannot be asked for any more."""
        if self._is_movable(digest) and not self._is_wanted(digest):
            self._remove(digest)

    def check_integrity(self) -> None:
        """Leased weights are in memory or being loaded, and bytes are counted right."""
        ensure(self.num_bytes == sum(self._bytes.values()), "bytes are miscounted")
        ensure(all(count > 0 for count in self._leases.values()), "a lease is negative")
        ensure(set(self._leases) <= set(self._bytes), "leased weights are not in memory")
        ensure(set(self._loading) <= set(self._bytes), "weights on their way have no room")

    async def _reserve(self, needs: Mapping[str, int], load: Load) -> list[asyncio.Task[None]]:
        now = asyncio.get_running_loop().time()
        starving = bool(self._queue) and now - self._queue[0].since > MAX_QUEUE_SECONDS
        in_memory = all(digest in self._bytes for digest in needs)
        if (in_memory and not starving) or (not self._queue and self._fits(needs)):
            return self._take(needs, load)
        if len(self._queue) >= self.max_waiting:
            raise QueueFull(self.max_waiting)
        ticket = _Ticket(needs, load, now)
        self._queue.append(ticket)
        self._admit()
        try:
            return await ticket.admitted
        except asyncio.CancelledError:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._admit()
            elif ticket.admitted.done() and not ticket.admitted.cancelled():
                self.release(needs)
            raise

    def _admit(self) -> None:
        while self._queue and self._fits(self._queue[0].needs):
            ticket = self._queue.popleft()
            if not ticket.admitted.done():
                ticket.admitted.set_result(self._take(ticket.needs, ticket.load))

    def _take(self, needs: Mapping[str, int], load: Load) -> list[asyncio.Task[None]]:
        """Lease, evict what the missing weights need, and begin to load them; returns the loads to wait for."""
        self._leases.update(needs.keys())
        missing = {digest: size for digest, size in needs.items() if digest not in self._bytes}
        if missing:
            self._evict(sum(missing.values()))
        for digest, size in missing.items():
            self._bytes[digest] = size
            self.num_bytes += size
            self._loading[digest] = asyncio.ensure_future(self._load_weights(digest, load))
            self._loading[digest].add_done_callback(retrieve_exception)
        for digest in needs:
            self._bytes.move_to_end(digest)
        return [self._loading[digest] for digest in needs if digest in self._loading]

    async def _load_weights(self, digest: str, load: Load) -> None:
        """Load for all requests that wait; cancelling one of them does not cancel the load."""
        try:
            taken = await load(digest)
        except BaseException:
            del self._loading[digest]
            self.num_bytes -= self._bytes.pop(digest)
            self._admit()
            raise
        del self._loading[digest]
        self.num_bytes += taken - self._bytes[digest]
        self._bytes[digest] = taken
        if self.num_bytes > self.max_bytes:
            self._evict(0)
        self.drop_unwanted(digest)
        self._admit()

    def _evict(self, coming: int) -> None:
        """Free idle weights, least recently used first, until ``coming`` bytes and ``spare`` fit."""
        for digest in [digest for digest in self._bytes if self._is_movable(digest)]:
            if self.num_bytes + coming <= self.max_bytes - self.spare:
                return
            self._remove(digest)
            self.num_evicted += 1

    def _fits(self, needs: Mapping[str, int]) -> bool:
        """Whether there is room after evictions; also where only pins prevent it, because waiting would not help."""
        missing = sum(size for digest, size in needs.items() if digest not in self._bytes)
        if not missing or self._immovable(needs) + missing <= self.max_bytes:
            return True
        return all(digest in needs for digest in (*self._leases, *self._loading))

    def _immovable(self, needs: Mapping[str, int]) -> int:
        return sum(size for digest, size in self._bytes.items() if digest in needs or not self._is_movable(digest))

    def _is_movable(self, digest: str) -> bool:
        in_use = digest in self._leases or digest in self._loading or digest in self._pinned
        return digest in self._bytes and not in_use

    def _remove(self, digest: str) -> None:
        self.num_bytes -= self._bytes.pop(digest)
        self._unload(digest)


def retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Mark a task's exception as retrieved: asyncio would log it if no request waits for the task any more."""
    if not task.cancelled():
        task.exception()
