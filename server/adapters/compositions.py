"""Which adapters can be scaled, and added to each other."""

from __future__ import annotations

from dataclasses import replace

from server.adapters.adapter_cache import LeasedAdapter
from server.adapters.names import ModelRef
from server.errors import InvalidRequest


def scaled(refs: tuple[ModelRef, ...], scale: float | None) -> tuple[ModelRef, ...]:
    """The adapters with the request's ``lora_scale``. Raises ``InvalidRequest`` if it has no single adapter."""
    if scale is None:
        return refs
    if not refs:
        if scale == 1:
            return refs
        raise InvalidRequest(
            "Invalid 'lora_scale': the base has no adapter to scale; name one in 'model'.", param="lora_scale"
        )
    if len(refs) != 1 or refs[0].scale != 1:
        raise InvalidRequest(
            "Invalid 'lora_scale': 'model' names several adapters or a weight; use one or the other.",
            param="lora_scale",
        )
    return (replace(refs[0], scale=scale),)


def check_composition(adapters: tuple[LeasedAdapter, ...]) -> None:
    """Raises ``InvalidRequest`` for a scaled or added adapter with more than low-rank deltas."""
    if len(adapters) == 1 and adapters[0].scale == 1:
        return
    for leased in adapters:
        if not leased.adapter.listing.plan.composable:
            raise InvalidRequest(
                f"'{leased.adapter.name}' cannot be scaled or added to others: the adapter is not plain LoRA (it has "
                "magnitudes, biases or saved weights).",
                param="model",
            )
    if len({leased.adapter.defaults.added_tokens for leased in adapters} - {()}) > 1:
        raise InvalidRequest(
            "These adapters cannot be added to each other: their tokenizers have different added tokens.", param="model"
        )
