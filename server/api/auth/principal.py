"""The principal of a request: the API key that it was sent with, as what the key may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AccessScope(StrEnum):
    """What a key opens. ``ADMIN`` includes all others."""

    INFER = "infer"
    METRICS = "metrics"
    TRAIN = "train"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """The holder of a key, or anonymous.

    ``id`` is the owner of sequences and cached prefixes; ``label`` is for logs and metrics, and comes from the
    operator's key file or a closed set. ``adapters`` are the only adapters that exist for it; None: all. The limits
    count HTTP requests; None: no limit.
    """

    id: str
    label: str
    scopes: frozenset[AccessScope]
    adapters: frozenset[str] | None = None
    max_concurrent: int | None = None
    requests_per_minute: int | None = None

    def allows(self, scope: AccessScope) -> bool:
        return scope in self.scopes or AccessScope.ADMIN in self.scopes

    def may_use(self, adapter: str) -> bool:
        """Whether an adapter exists for this principal, by its own name, not an alias's."""
        return self.adapters is None or adapter in self.adapters


ANONYMOUS_LABEL = "anonymous"
WITHOUT_KEYS = Principal(
    ANONYMOUS_LABEL, ANONYMOUS_LABEL, frozenset({AccessScope.INFER, AccessScope.METRICS, AccessScope.TRAIN})
)
"""Every request where no keys are configured."""
NOBODY = Principal(ANONYMOUS_LABEL, ANONYMOUS_LABEL, frozenset(), frozenset())
"""A request without a key for a path that is open, such as a probe, where keys are configured."""
