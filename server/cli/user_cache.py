"""Where what can be computed again is kept for the next start."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """A folder of the user's cache, which need not exist yet; None where the user has none.

    It is ``$XDG_CACHE_HOME/quickchange``, or ``~/.cache/quickchange``, as the XDG Base Directory Specification says: a
    variable that is no absolute path does not count.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            return None
    return root / "quickchange" / name
