"""What an adapter must fit: the base's modules that see every row of a batch, and their parameters' shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from adapter_format.sidecar import Sidecar
from server.adapters.content.added_tokens import BaseTokenizer

Shape = tuple[int, ...]
Kind = Literal["linear", "embedding", "rows"]
BaseCheck = Literal["fingerprint_v2", "fingerprint", "shapes"]
"""How it is known that an adapter is of this base."""


@dataclass(frozen=True)
class ModuleShape:
    """A module whose result for a row depends on that row alone.

    ``size`` is (in, out) of a linear, (tokens, dim) of an embedding; ``rows`` is any other module: a norm, a router,
    the experts of a mixture. ``transposed`` is a weight [in, out], or experts [experts, in, out]. ``itemsize`` is the
    bytes of a number, ``axis`` that of the rows in what goes in and comes out.
    """

    kind: Kind
    parameters: Mapping[str, Shape]
    size: tuple[int, int] = (0, 0)
    transposed: bool = False
    itemsize: int = 4
    axis: int = 1

    @property
    def weight_is_in_out(self) -> bool:
        """Whether the weight is [in, out], as an embedding's and a Conv1D's, rather than a linear's [out, in]."""
        return self.kind == "embedding" or self.transposed

    def num_bytes(self, parameter: str) -> int:
        return self.itemsize * math.prod(self.parameters[parameter])


def linear(in_features: int, out_features: int, *, bias: bool = False) -> ModuleShape:
    """A linear layer in float32."""
    parameters: dict[str, Shape] = {"weight": (out_features, in_features)}
    return ModuleShape("linear", parameters | ({"bias": (out_features,)} if bias else {}), (in_features, out_features))


def embedding(num_tokens: int, dim: int) -> ModuleShape:
    """An embedding in float32."""
    return ModuleShape("embedding", {"weight": (num_tokens, dim)}, (num_tokens, dim))


@dataclass(frozen=True)
class BaseSignature:
    """The base's name and fingerprint, its modules, and which heads share an embedding's weight (head -> embedding).

    ``fingerprint`` is of version 1; ``fingerprint_v2`` is None where it is not known.
    ``others`` are modules that adapters cannot touch, because they do not see every row. ``vocab_size`` is the number
    of the embedding's rows, ``tokenizer`` None where an adapter's cannot be compared with it.
    """

    name: str
    fingerprint: str
    modules: Mapping[str, ModuleShape]
    chat_template: str | None = None
    vocab_size: int = 0
    tied: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    fingerprint_v2: str | None = None
    tokenizer: BaseTokenizer | None = field(default=None, compare=False)

    def fingerprint_of(self, version: int) -> str:
        """The fingerprint of a version, or of version 1 where that one is not known."""
        return self.fingerprint_v2 if version == 2 and self.fingerprint_v2 is not None else self.fingerprint


def base_check(sidecar: Sidecar | None, base: BaseSignature) -> BaseCheck:
    """How a sidecar shows that the base is the one it was trained on: by the latest fingerprint that both have.

    Without a sidecar only the tensors' shapes can tell. Raises ``ValueError`` where it is another base.
    """
    if sidecar is None:
        return "shapes"
    theirs = sidecar.base
    by_v2 = base.fingerprint_v2 is not None and theirs.fingerprint_v2 is not None
    if by_v2 and theirs.fingerprint_v2 == base.fingerprint_v2:
        return "fingerprint_v2"
    same_edges = theirs.fingerprint is not None and theirs.fingerprint == base.fingerprint
    if same_edges and not by_v2:
        return "fingerprint"
    raise ValueError(
        f"it was trained on another base ({theirs.name}, fingerprint {theirs.best_fingerprint[:19]}); this server runs "
        f"{base.name} ({base.fingerprint_of(2 if theirs.fingerprint_v2 else 1)[:19]})"
        + (", whose weights differ though its fingerprint of version 1 is the same" if same_edges else "")
        + ": start it with that base, or train the adapter again"
    )
