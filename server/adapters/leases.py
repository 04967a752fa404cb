"""What a request holds of adapters, and what loading one of them gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.adapters.content.manners import AdapterDefaults
from server.adapters.reader import FolderMoved
from server.adapters.registry import Adapter
from server.errors import AdapterNotLoaded, QuickchangeError
from server.metrics import COMPOSITION
from server.sequence import AdapterUse

logger = logging.getLogger("quickchange.adapters")


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
    def uses(self) -> tuple[AdapterUse, ...]:
        return tuple(AdapterUse(leased.adapter.weights_digest, leased.scale) for leased in self.adapters)

    @property
    def label(self) -> str:
        """``name@digest``, joined by ``+`` where there are several; it can be asked for as a model."""
        return "+".join(leased.label for leased in self.adapters)

    @property
    def metrics_label(self) -> str:
        """The adapter's name; compositions are counted under one name together."""
        return self.adapters[0].adapter.name if len(self.adapters) == 1 else COMPOSITION

    @property
    def defaults(self) -> AdapterDefaults:
        """The first one's manners; what ends an answer of any of them ends this one, and tokens are those of all."""
        manners = [one.adapter.defaults for one in self.adapters]
        stop = dict.fromkeys(text for one in manners for text in one.stop)
        eos = dict.fromkeys(token for one in manners for token in one.eos)
        ends = dict.fromkeys(token for one in manners for token in one.end_tokens)
        added = next((one.added_tokens for one in manners if one.added_tokens), ())
        return replace(manners[0], stop=tuple(stop), eos=tuple(eos), end_tokens=tuple(ends), added_tokens=added)

    def release(self) -> None:
        """Give it back; once."""
        self._release()


class Loaded(NamedTuple):
    """Weights in the engine: how far they move the base, and the bytes that they take."""

    delta_norm: float
    num_bytes: int


@contextmanager
def loading(name: str) -> Iterator[None]:
    """What fails inside, but for what is known to be the folder's fault, is an ``AdapterNotLoaded`` and in the log."""
    try:
        yield
    except (QuickchangeError, FolderMoved):
        raise
    except Exception as error:
        logger.exception("adapter %s could not be loaded", name)
        raise AdapterNotLoaded(name) from error
