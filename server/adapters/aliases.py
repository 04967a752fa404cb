"""``aliases.toml`` in the adapter folder: names that stand for a model text, or for several by weight.

``support = "helpdesk"`` points a name at an adapter or at the base, and
``support = {"helpdesk@ab12" = 0.9, "helpdesk@cd34" = 0.1}`` sends a tenth of the users to a canary.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from server.adapters.names import parse_model
from server.errors import InvalidRequest, ModelNotFound

ALIASES_FILE = "aliases.toml"
MAX_ALIASES_BYTES = 1024 * 1024
MAX_WEIGHT = 1e9
MAX_NAME_CHARS = 128


@dataclass(frozen=True)
class Target:
    """A model text, and the share of the alias's users that it gets; the shares of an alias add up to 1."""

    model: str
    share: float


@dataclass(frozen=True)
class Alias:
    """A name that stands for its targets, in the file's order."""

    name: str
    targets: tuple[Target, ...]

    @cached_property
    def adapters(self) -> frozenset[str]:
        """The names in all of its targets."""
        return frozenset(ref.name for target in self.targets for ref in parse_model(target.model))

    def choose(self, user: str | None, draw: Callable[[], float] = random.random) -> str:
        """The model text for a request.

        A user has a place from 0 to 1 that depends on alias and user alone, and the targets' shares lie side by side in
        the file's order: while the last target grows at the cost of the one before, users move only into it. Without a
        user, or with an empty one, the place is drawn.
        """
        place = _place(self.name, user) if user else draw()
        for target in self.targets:
            place -= target.share
            if place < 0:
                return target.model
        return self.targets[-1].model  # the shares add up to 1 but for rounding


def _place(alias: str, user: str) -> float:
    digest = hashlib.sha256(f"{alias}\0{user}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # the bits of a float below 1


def parse_aliases(data: bytes) -> Mapping[str, Alias]:
    """The aliases of a file, by name. Raises ``ValueError`` with a sentence that names alias and value."""
    if len(data) > MAX_ALIASES_BYTES:
        raise ValueError(f"{ALIASES_FILE} has {len(data)} bytes; the limit is {MAX_ALIASES_BYTES}")
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{ALIASES_FILE} is not valid TOML: {error}") from None
    return {name: _alias(name, value, table.keys()) for name, value in table.items()}


def is_alias_name(text: str) -> bool:
    """Whether a text can be an alias: printable, and the same in a URL path."""
    return (
        0 < len(text) <= MAX_NAME_CHARS
        and text.isprintable()
        and text == text.strip()
        and not {"", ".", ".."}.intersection(text.split("/"))
    )


def _alias(name: str, value: Any, names: Collection[str]) -> Alias:
    if not is_alias_name(name):
        raise ValueError(
            f"{ALIASES_FILE}: {name!r:.80} is no alias name: use at most {MAX_NAME_CHARS} printable characters, no "
            "space at its ends, and between slashes something other than '.' and '..'"
        )
    weights = {value: 1} if isinstance(value, str) else value
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            f"{ALIASES_FILE}: alias {name!r} is {value!r:.80}: it must be a model or a table of models and weights"
        )
    for model, weight in weights.items():
        _check_weight(name, model, weight)
        _check_model(name, model, names)
    total = sum(weights.values())
    return Alias(name, tuple(Target(model, weight / total) for model, weight in weights.items()))


def _check_weight(alias: str, model: str, weight: Any) -> None:
    if isinstance(weight, dict):  # the TOML of v1.0 = "x" is {"v1": {"0": "x"}}
        raise ValueError(f"{ALIASES_FILE}: alias {alias!r} has a table at {model!r:.80}: put names with dots in quotes")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise ValueError(
            f"{ALIASES_FILE}: alias {alias!r} gives {model!r:.80} the weight {weight!r:.80}: it must be a positive "
            f"number, {MAX_WEIGHT:,.0f} at most; names with dots need quotes"
        )


def _check_model(alias: str, model: str, names: Collection[str]) -> None:
    try:
        refs = parse_model(model)
    except ModelNotFound:
        raise ValueError(f"{ALIASES_FILE}: alias {alias!r} points at {model!r:.80}, which is no model's name") from None
    except InvalidRequest as error:
        raise ValueError(f"{ALIASES_FILE}: alias {alias!r} points at {model!r:.80}: {error}") from None
    if chained := next((ref.name for ref in refs if ref.name in names), None):
        raise ValueError(
            f"{ALIASES_FILE}: alias {alias!r} points at {model!r:.80}, and {chained!r} is an alias in this file: point "
            "it at adapters, aliases are not followed twice"
        )
