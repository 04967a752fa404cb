"""``system_fingerprint`` changes with whatever may change the answer to the same seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.adapters.adapter_cache import Lease, LeasedAdapter
from server.api.app import create_app
from server.api.formats.wire import fingerprint
from server.api.state import ServerState
from tests.fakes import BASE, FakeEngine, adapter, ask, server_state


def lease(*adapters: LeasedAdapter) -> Lease:
    return Lease(adapters, lambda: None)


def test_base_computation_version_and_every_adapter_count() -> None:
    poet, clerk = adapter("poet"), adapter("clerk")
    changed = replace(poet, version_digest="another".ljust(64, "0"))
    leases = [
        None,
        lease(LeasedAdapter(poet)),
        lease(LeasedAdapter(changed)),
        lease(LeasedAdapter(poet, 0.5)),
        lease(LeasedAdapter(poet), LeasedAdapter(clerk)),
    ]
    bases = ["sha256:a cpu float32", "sha256:b cpu float32", "sha256:a cpu bfloat16"]
    marks = [fingerprint(base, each, version) for base in bases for each in leases for version in ("1", "2")]
    assert len(set(marks)) == len(marks)
    assert all(mark.startswith("fp_") and len(mark) == 15 for mark in marks)
    assert fingerprint(bases[0], leases[1], "1") == fingerprint(bases[0], lease(LeasedAdapter(poet)), "1")


def test_the_answer_has_the_fingerprint_of_the_computation_not_of_the_name() -> None:
    def mark(state: ServerState) -> Any:
        body = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
        return ask(create_app(state), "POST", "/v1/chat/completions", json=body).json()["system_fingerprint"]

    state = server_state(FakeEngine())
    assert mark(state) == mark(state)
    assert mark(state) != mark(replace(state, computation="sha256:other cpu"))
