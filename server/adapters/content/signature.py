"""The base as adapters are checked against it: fingerprints, tokenizer, modules and their parameters' shapes."""

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
"""How an adapter's base was verified."""


@dataclass(frozen=True)
class ModuleShape:
    """A module whose output for a row depends on that row alone.

    ``size`` is (in, out) of a linear layer, (tokens, dim) of an embedding. ``rows`` is any other module: a norm, a
    router, the experts of a mixture. ``transposed``: the weight is [in, out], or [experts, in, out]. ``itemsize`` is
    the bytes of an element, ``axis`` the axis of the rows in input and output.
    """

    kind: Kind
    parameters: Mapping[str, Shape]
    size: tuple[int, int] = (0, 0)
    transposed: bool = False
    itemsize: int = 4
    axis: int = 1

    @property
    def weight_is_in_out(self) -> bool:
        """Whether the weight is [in, out], as in an embedding and a Conv1D, instead of [out, in]."""
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
    """The base's name, fingerprints and modules. ``tied`` maps heads to the embedding whose weight they share.

    ``fingerprint`` is of version 1; ``fingerprint_v2`` is None if unknown. ``others`` are modules that adapters cannot
    change, because they do not see every row. ``vocab_size`` is the number of the embedding's rows. ``tokenizer`` is
    None if an adapter's cannot be compared with it.
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
        """The fingerprint of ``version``, or of version 1 if that is unknown."""
        return self.fingerprint_v2 if version == 2 and self.fingerprint_v2 is not None else self.fingerprint


def base_check(sidecar: Sidecar | None, base: BaseSignature) -> BaseCheck:
    """Verify an adapter's base by the latest fingerprint that sidecar and base both have.

    Without a sidecar only shapes can be compared. Raises ``ValueError`` for another base.
    """
    if sidecar is None:
        return "shapes"
    trained_on = sidecar.base
    by_v2 = base.fingerprint_v2 is not None and trained_on.fingerprint_v2 is not None
    if by_v2 and trained_on.fingerprint_v2 == base.fingerprint_v2:
        return "fingerprint_v2"
    same_v1 = trained_on.fingerprint is not None and trained_on.fingerprint == base.fingerprint
    if same_v1 and not by_v2:
        return "fingerprint"
    raise ValueError(
        f"it was trained on another base ({trained_on.name}, fingerprint {trained_on.best_fingerprint[:19]}); this "
        f"server runs {base.name} ({base.fingerprint_of(2 if trained_on.fingerprint_v2 else 1)[:19]})"
        + (", whose weights differ though its fingerprint of version 1 is the same" if same_v1 else "")
        + ": start the server with that base, or train the adapter again"
    )
