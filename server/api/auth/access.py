"""Who may send requests to a server: what its settings say, and what is counted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from server.api.auth.key_limits import KeyLimits
from server.api.auth.keys import KeyRing
from server.api.auth.wrong_keys import WrongKeys


@dataclass
class Access:
    """The keys in force and what is counted for them; whether the server listens on loopback only.

    ``hosts`` are the names of the server, None for any; ``origins`` are those whose web pages may use it.
    ``on_new_keys`` is told of keys that replace the ones before.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    on_loopback: bool = True
    limits: KeyLimits = field(default_factory=KeyLimits)
    wrong_keys: WrongKeys = field(default_factory=WrongKeys)
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
    on_new_keys: Callable[[KeyRing], None] = lambda keys: None

    def replace_keys(self, keys: KeyRing) -> None:
        """Requests that are running keep their principals."""
        self.keys = keys
        self.limits.forget_idle(frozenset(key.principal.id for key in keys.keys))
        self.on_new_keys(keys)
