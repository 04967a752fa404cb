"""Leases of adapters, and an LRU cache of their weights with a limit in bytes. Only the event loop uses it: no locks.

Leased and pinned weights are never evicted. A load reserves an upper bound of its bytes; the real size replaces it once
the weights are loaded. Requests whose weights do not fit wait in a FIFO queue. Weights in memory are leased at once,
past the queue, until its first request has waited for ``MAX_QUEUE_SECONDS``.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.registry import Adapter
from server.errors import QueueFull
from server.integrity import ensure
from server.metrics import COMPOSITION
from server.sequence import LoRARequest

MAX_QUEUE_SECONDS = 1.0
"""Seconds after which the first request of the queue goes before requests whose weights are in memory."""

Load = Callable[[str], Awaitable[int]]
"""Loads weights by their digest; returns their bytes in memory."""


@dataclass(frozen=True)
class LeasedAdapter:
    """A version of an adapter in memory, and the scale of its delta."""

    adapter: Adapter
    scale: float = 1.0

    @property
    def label(self) -> str:
        """``name@digest``, with ``:scale`` if that is not 1."""
        return self.adapter.label if self.scale == 1 else f"{self.adapter.label}:{self.scale:g}"


def joint_defaults(adapters: Sequence[Adapter]) -> GenerationDefaults:
    """The generation defaults of the first adapter, with the stop strings, end tokens and added tokens of all."""
    every = [adapter.defaults for adapter in adapters]
    return replace(
        every[0],
        stop=tuple(dict.fromkeys(text for defaults in every for text in defaults.stop)),
        eos=tuple(dict.fromkeys(token for defaults in every for token in defaults.eos)),
        end_tokens=tuple(dict.fromkeys(token for defaults in every for token in defaults.end_tokens)),
        added_tokens=next((defaults.added_tokens for defaults in every if defaults.added_tokens), ()),
    )


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
        """The label of every adapter, joined by ``+``; a request can give it as ``model``."""
        return "+".join(leased.label for leased in self.adapters)

    @property
    def metrics_label(self) -> str:
        """The adapter's name; all compositions share one label."""
        return self.adapters[0].adapter.name if len(self.adapters) == 1 else COMPOSITION

    @property
    def defaults(self) -> GenerationDefaults:
        return joint_defaults([leased.adapter for leased in self.adapters])

    def release(self) -> None:
        """Release the adapters; call it once."""
        self._release()


class Loaded(NamedTuple):
    """Norm of an adapter's weight change, and its bytes in memory."""

    delta_norm: float
    num_bytes: int


@dataclass(eq=False)
class _Ticket:
    """A queued request, which needs room for all of ``needs``: bytes by weights digest."""

    needs: Mapping[str, int]
    load: Load
    since: float
    admitted: asyncio.Future[list[asyncio.Task[None]]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class AdapterCache:
    """Weights by digest, with their bytes, leases and pins.

    ``unload(digest)`` frees weights; ``is_wanted(digest)`` tells whether requests may use them again. ``num_bytes``
    counts weights in memory and those being loaded. At most ``max_waiting`` requests wait for room. Idle weights leave
    ``spare`` of ``max_bytes`` free for batched copies; leased weights may use it.
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
        """Weights in memory, least recently used first."""
        return [digest for digest in self._bytes if digest not in self._loading]

    @property
    def waiting(self) -> set[str]:
        """Weights being loaded, and those that queued requests need and that are not in memory."""
        queued = {digest for ticket in self._queue for digest in ticket.needs if digest not in self._bytes}
        return queued | set(self._loading)

    def __contains__(self, digest: str) -> bool:
        """Whether weights are in memory or being loaded."""
        return digest in self._bytes

    def state(self, digest: str) -> str | None:
        """``resident``, ``loading``, or None."""
        if digest not in self._bytes:
            return None
        return "loading" if digest in self._loading else "resident"

    def num_leases(self, digest: str) -> int:
        """Requests that use these weights or wait until they are loaded."""
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
        """Lease all weights or none: wait for room, then load the missing ones.

        Raises ``QueueFull``, and whatever ``load`` raises.
        """
        loading = await self._reserve(needs, load)
        try:
            for task in loading:
                await asyncio.shield(task)
        except BaseException:
            self.release(needs)
            raise

    def has_room(self, num_bytes: int) -> bool:
        return not self._queue and self._unevictable_bytes({}) + num_bytes <= self.max_bytes

    def release(self, digests: Iterable[str]) -> None:
        """Release leases; weights that no request can use any more are freed."""
        for digest in digests:
            ensure(self._leases[digest] > 0, "released more often than leased")
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
            self.drop_unwanted(digest)
        self._admit()

    def drop_unwanted(self, digest: str) -> None:
        """Free idle weights that no request can use any more."""
        if self._is_evictable(digest) and not self._is_wanted(digest):
            self._remove(digest)

    def check_integrity(self) -> None:
        """Check that leased weights are in memory or being loaded, and that ``num_bytes`` is their sum."""
        ensure(self.num_bytes == sum(self._bytes.values()), "num_bytes is not the sum of the weights")
        ensure(all(count > 0 for count in self._leases.values()), "a lease is negative")
        ensure(set(self._leases) <= set(self._bytes), "leased weights are not in memory")
        ensure(set(self._loading) <= set(self._bytes), "weights being loaded have no reserved bytes")

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
        """Lease, make room for missing weights and start loading them; returns the loads to wait for."""
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
        """Load for all waiting requests; cancelling one of them does not cancel the load."""
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

    def _evict(self, num_bytes: int) -> None:
        """Free idle weights, least recently used first, until ``num_bytes`` more and ``spare`` fit."""
        for digest in [digest for digest in self._bytes if self._is_evictable(digest)]:
            if self.num_bytes + num_bytes <= self.max_bytes - self.spare:
                return
            self._remove(digest)
            self.num_evicted += 1

    def _fits(self, needs: Mapping[str, int]) -> bool:
        """Whether there is room after evictions, or only pins prevent it: then waiting would not help."""
        missing = sum(size for digest, size in needs.items() if digest not in self._bytes)
        if not missing or self._unevictable_bytes(needs) + missing <= self.max_bytes:
            return True
        return all(digest in needs for digest in (*self._leases, *self._loading))

    def _unevictable_bytes(self, needs: Mapping[str, int]) -> int:
        return sum(size for digest, size in self._bytes.items() if digest in needs or not self._is_evictable(digest))

    def _is_evictable(self, digest: str) -> bool:
        in_use = digest in self._leases or digest in self._loading or digest in self._pinned
        return digest in self._bytes and not in_use

    def _remove(self, digest: str) -> None:
        self.num_bytes -= self._bytes.pop(digest)
        self._unload(digest)


def retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Mark a task's exception as retrieved: asyncio would log it if no request waits for the task any more."""
    if not task.cancelled():
        task.exception()
