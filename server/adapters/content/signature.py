"""The base as adapters are checked against it: fingerprints, tokenizer, modules and their parameters' shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from server.adapters.content.added_tokens import BaseTokenizer
from server.adapters.content.base_samples import BaseSamples

Shape = tuple[int, ...]
Kind = Literal["linear", "embedding", "rows"]
BaseCheck = Literal["fingerprint_v2", "fingerprint", "weights_sample", "shapes"]
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

    ``setting`` is what ``base_model`` says, if that is another name. ``fingerprint`` is of version 1, which
    a GGUF file has not; ``fingerprint_v2`` is None if unknown. ``others`` are modules that adapters cannot
    change, because they do not see every row. ``vocab_size`` is the number of the embedding's rows. ``tokenizer`` is
    None if an adapter's cannot be compared with it; ``samples`` is None if other formats of the base cannot.
    """

    name: str
    fingerprint: str | None
    modules: Mapping[str, ModuleShape]
    chat_template: str | None = None
    vocab_size: int = 0
    tied: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    fingerprint_v2: str | None = None
    tokenizer: BaseTokenizer | None = field(default=None, compare=False)
    setting: str | None = None
    samples: BaseSamples | None = field(default=None, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.setting is None else (self.name, self.setting)

    def fingerprint_of(self, version: int) -> str:
        """The fingerprint of ``version``, or the other one if that is unknown."""
        known = [self.fingerprint_v2, self.fingerprint] if version == 2 else [self.fingerprint, self.fingerprint_v2]
        return next(fingerprint for fingerprint in known if fingerprint is not None)
