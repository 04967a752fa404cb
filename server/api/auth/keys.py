"""API keys by their digests. The keys themselves are stored nowhere.

Digests are plain SHA-256. A slow hash such as bcrypt protects short passwords against guessing; keys that the server
makes have 256 random bits, which cannot be guessed at any speed, and a slow hash on every request would be an attack.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from server.api.auth.principal import WITHOUT_KEYS, AccessScope, Principal


@dataclass(frozen=True)
class ApiKey:
    """The SHA-256 of a key, and its principal."""

    digest: bytes
    principal: Principal


@dataclass(frozen=True)
class KeyRing:
    """All keys. ``is_open``: requests without a valid key are anonymous, because only an admin key is set, or none."""

    keys: Sequence[ApiKey] = ()
    is_open: bool = True

    def find(self, credential: bytes) -> Principal | None:
        """The principal of a key, the first that has it. All digests are compared, each in constant time."""
        digest = hashlib.sha256(credential).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.digest) and found is None:
                found = key.principal
        return found

    @property
    def has_admin(self) -> bool:
        return any(key.principal.allows(AccessScope.ADMIN) for key in self.keys)


def single_key(key: str) -> ApiKey:
    """The key of the setting ``api_key``, for inference and metrics."""
    scopes = frozenset({AccessScope.INFER, AccessScope.METRICS})
    return ApiKey(digest_of(key), Principal("api_key", "api_key", scopes))


def admin_key(key: str) -> ApiKey:
    """The key of the setting ``admin_key``."""
    return ApiKey(digest_of(key), Principal("admin_key", "admin_key", frozenset({AccessScope.ADMIN})))


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def without_keys(credential: bytes | None) -> Principal:
    """The anonymous principal; whatever key a client sends separates its cached prefixes from others'."""
    if credential is None:
        return WITHOUT_KEYS
    owner = f"{WITHOUT_KEYS.id}-{hashlib.sha256(credential).hexdigest()}"
    return Principal(owner, WITHOUT_KEYS.label, WITHOUT_KEYS.scopes)
