"""Books that must balance: leases of adapters, and the names they move under."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.adapters.registry import Adapter, AdapterDefaults, AdapterRegistry
from server.errors import ModelNotFound


def adapter(name: str, weights: str, version: str = "v") -> Adapter:
    return Adapter(name, version, weights, 8, 1, 1, 0, Path(name), AdapterDefaults())


@pytest.fixture
def freed() -> list[str]:
    return []


@pytest.fixture
def registry(freed: list[str]) -> AdapterRegistry:
    return AdapterRegistry(freed.append)


def test_an_unknown_name_is_not_found(registry: AdapterRegistry) -> None:
    with pytest.raises(ModelNotFound, match="`ghost`"):
        registry.acquire("ghost")


def test_a_withdrawn_adapter_is_freed_when_its_last_lease_ends(registry: AdapterRegistry, freed: list[str]) -> None:
    registry.publish(adapter("a", "w1"))
    first, second = registry.acquire("a"), registry.acquire("a")
    registry.withdraw("a")
    registry.release(first)
    assert freed == []
    registry.release(second)
    assert freed == ["w1"]
    with pytest.raises(ModelNotFound):
        registry.get("a")


def test_a_replaced_adapter_stays_for_who_holds_it(registry: AdapterRegistry, freed: list[str]) -> None:
    registry.publish(adapter("a", "w1"))
    held = registry.acquire("a")
    registry.publish(adapter("a", "w2"))
    assert registry.acquire("a").weights_digest == "w2"
    assert freed == []
    registry.release(held)
    assert freed == ["w1"]


def test_an_idle_adapter_is_freed_when_it_is_replaced(registry: AdapterRegistry, freed: list[str]) -> None:
    registry.publish(adapter("a", "w1"))
    registry.publish(adapter("a", "w2"))
    assert freed == ["w1"]


def test_weights_shared_by_two_names_stay_while_one_is_left(registry: AdapterRegistry, freed: list[str]) -> None:
    registry.publish(adapter("a", "same"))
    registry.publish(adapter("b", "same"))
    registry.withdraw("a")
    assert freed == []
    registry.withdraw("b")
    assert freed == ["same"]


def test_a_changed_sidecar_keeps_the_weights(registry: AdapterRegistry, freed: list[str]) -> None:
    registry.publish(adapter("a", "w", "v1"))
    registry.publish(adapter("a", "w", "v2"))
    assert freed == []
    assert registry.get("a").version_digest == "v2"


def test_adapters_are_listed_by_name(registry: AdapterRegistry) -> None:
    for name in ("b", "c", "a"):
        registry.publish(adapter(name, name))
    assert [one.name for one in registry.list()] == ["a", "b", "c"]
    registry.check_integrity()
