"""Limits of a key: requests per minute, as a token bucket, and requests at the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.api.auth.principal import Principal
from server.errors import ConcurrencyLimitExceeded, RateLimitExceeded

_SECONDS = 60.0


@dataclass
class _Usage:
    """``tokens`` is the content of the bucket at time ``since``."""

    tokens: float
    since: float
    running: int = 0


class KeyLimits:
    """Counts the requests of principals that have limits. A full bucket holds the requests of one minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    def begin(self, principal: Principal) -> None:
        """Count a request, whose end the caller reports.

        Raises ``ConcurrencyLimitExceeded`` or ``RateLimitExceeded``; a request that is refused is not counted.
        """
        if not _is_limited(principal):
            return
        usage = self._usage.setdefault(principal.id, _Usage(math.inf, self._clock()))
        if principal.max_concurrent is not None and usage.running >= principal.max_concurrent:
            raise ConcurrencyLimitExceeded(principal.max_concurrent)
        if principal.requests_per_minute is not None:
            self._take_token(usage, principal.requests_per_minute)
        usage.running += 1

    def end(self, principal: Principal) -> None:
        """A request that was counted has ended."""
        if _is_limited(principal):
            self._usage[principal.id].running -= 1

    def _take_token(self, usage: _Usage, per_minute: int) -> None:
        now = self._clock()
        usage.tokens = min(usage.tokens + (now - usage.since) * per_minute / _SECONDS, float(per_minute))
        usage.since = now
        if usage.tokens < 1:
            raise RateLimitExceeded(per_minute, retry_after=(1 - usage.tokens) * _SECONDS / per_minute)
        usage.tokens -= 1

    def forget_idle(self, keep: frozenset[str]) -> None:
        """Drop the counts of principals that a reload removed and that have no running request."""
        gone = [owner for owner, usage in self._usage.items() if owner not in keep and not usage.running]
        for owner in gone:
            del self._usage[owner]


def _is_limited(principal: Principal) -> bool:
    return principal.max_concurrent is not None or principal.requests_per_minute is not None
