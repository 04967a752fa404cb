"""A base's folder as a hub's cache has it: a snapshot of links to blobs that are named by their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def as_in_hub_cache(folder: Path, cache: Path) -> Path:
    """Move a folder's files into a cache; returns the snapshot's folder."""
    repository = cache / "models--someone--base"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blobs / digest)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
    return snapshot
