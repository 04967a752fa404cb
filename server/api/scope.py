"""Whose a request is: what it leaves in the KV cache may speed up, and so be noticed by, requests of the same scope."""

from __future__ import annotations

import hashlib


def scope_of(authorization: str | None, cache_salt: str | None) -> bytes:
    """A digest of the key that was presented, if any, and of the salt. Neither can be had back from it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (authorization, cache_salt):
        said = b"" if part is None else part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:%d:" % (part is not None, len(said)) + said)
    return digest.digest()
