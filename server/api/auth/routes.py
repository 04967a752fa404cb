"""The scope that a request needs, judged by method and path as the router sees them, never by a rebuilt URL."""

from __future__ import annotations

from server.api.auth.principal import AccessScope

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/health"})
"""Answered without a key: they tell nothing but their status."""
_READS = ("GET", "HEAD")
_ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_TRAIN_PATHS = ("/v1/fine_tuning", "/v1/files")


def required_scope(method: str, path: str, *, on_loopback: bool) -> AccessScope | None:
    """None for what is open. A path without a rule needs ``INFER``; a request that changes a model, ``ADMIN``."""
    if method in _READS and (path in PROBES or (path == "/" and on_loopback)):
        return None
    if path == "/metrics":
        return AccessScope.METRICS
    if path in _ADMIN_PATHS or (_is_below("/v1/models", path) and method not in _READS):
        return AccessScope.ADMIN
    if any(_is_below(prefix, path) for prefix in _TRAIN_PATHS):
        return AccessScope.TRAIN
    return AccessScope.INFER


def _is_below(prefix: str, path: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")
