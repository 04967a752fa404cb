"""Embeddings over HTTP: forms of input and output, bounds, and that everything taken is given back."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from server.api import embeddings
from server.api.app import create_app
from server.sequence import LoRARequest
from tests.fakes import BASE, FakeEngine, Script, adapter, ask, encode, server_state

PATH = "/v1/embeddings"


def post(engine: FakeEngine, *adapters: Any, **fields: Any) -> httpx.Response:
    """One request."""
    return ask(create_app(server_state(engine, *adapters)), "POST", PATH, json={"model": BASE, **fields})


def vector(*ids: int) -> list[float]:
    """As the fake engine has it, of length 1."""
    numbers = np.array([len(ids), *ids[:3]], dtype=np.float64)
    return [float(number) for number in (numbers / np.linalg.norm(numbers)).astype(np.float32)]


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("hello", [encode("hello")]),
        (["hello", "the cat"], [encode("hello"), encode("the cat")]),
        ([9, 8, 7], [[9, 8, 7]]),
        ([[9, 8], [7]], [[9, 8], [7]]),
    ],
)
def test_an_input_may_be_written_in_four_ways(given: object, ids: list[list[int]]) -> None:
    response = post(FakeEngine(), input=given)
    CreateEmbeddingResponse.model_validate(response.json(), strict=True)
    assert response.json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector(*item)} for index, item in enumerate(ids)],
        "model": BASE,
        "usage": {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))},
    }


def test_base64_is_little_endian_float32() -> None:
    data = post(FakeEngine(), input=[9, 8, 7], encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(data), dtype="<f4").tolist() == vector(9, 8, 7)


def test_fewer_dimensions_are_the_first_ones_of_length_1() -> None:
    found = post(FakeEngine(), input=[9, 8, 7], dimensions=2).json()["data"][0]["embedding"]
    assert found == pytest.approx([3 / np.hypot(3, 9), 9 / np.hypot(3, 9)])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "empty_array"),
        ({"input": ["a", ""]}, "input", "empty_array"),
        ({"input": []}, "input", "empty_array"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"input": [10**6]}, "input", "invalid_value"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": [[5] * 257]}, "input", "context_length_exceeded"),
        ({"input": [[5] * 200] * 11}, "input", "array_above_max_length"),
        ({"input": "a", "dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"input": "a", "dimensions": 5}, "dimensions", "integer_above_max_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    fields: dict[str, Any], param: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "MAX_TOKENS", 2000)
    engine = FakeEngine()
    error = post(engine, **fields).json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert engine.num_open == 0 and not engine.submitted, "nothing is computed before"


def test_a_text_that_fills_the_context_is_embedded_and_a_longer_one_may_be_truncated_to_its_end() -> None:
    engine = FakeEngine()
    ids = list(range(10, 300))
    post(engine, input=[ids[:256]])
    post(engine, input=[ids], truncate_prompt_tokens=-1)
    post(engine, input=[ids], truncate_prompt_tokens=3)
    assert [each.prompt_ids for each in engine.submitted] == [tuple(ids[:256]), tuple(ids[-256:]), tuple(ids[-3:])]


def test_an_adapter_embeds_with_its_weights_and_is_released() -> None:
    engine = FakeEngine()
    state = server_state(engine, adapter("poet"))
    response = ask(create_app(state), "POST", PATH, json={"model": "poet", "input": "hello"})
    assert response.headers["x-quickchange-adapter"] == "poet@poet-version"
    assert engine.submitted[0].adapters == (LoRARequest("poet-weights"),)
    assert engine.submitted[0].owner == "anonymous"
    assert (engine.submitted[0].max_tokens, engine.submitted[0].params.embedding) == (0, True)
    assert state.adapters.cache.num_leases("poet-weights") == 0 and engine.num_open == 0
    assert state.metrics.requests.labels("poet", "embedding")._value.get() == 1


def test_many_inputs_take_little_of_the_queue_and_come_in_their_order() -> None:
    """More inputs than the engine has room for: they are computed a few at once."""
    engine = FakeEngine(capacity=3)
    ids = [[number, number + 1] for number in range(10, 110)]
    data = post(engine, input=ids).json()["data"]
    assert [item["embedding"] for item in data] == [vector(*item) for item in ids]


@pytest.mark.parametrize(
    ("engine", "status"),
    [
        (FakeEngine(alive=False), 503),
        (FakeEngine(capacity=0), 503),
        (FakeEngine([Script(), Script("", then="fail")]), 500),
        (FakeEngine([Script("", then="die")]), 503),
    ],
)
def test_a_failure_ends_all_sequences_and_releases_the_adapter(engine: FakeEngine, status: int) -> None:
    state = server_state(engine, adapter("poet"))
    response = ask(create_app(state), "POST", PATH, json={"model": "poet", "input": ["a", "b", "c"]})
    assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert engine.num_open == 0 and state.adapters.cache.num_leases("poet-weights") == 0


def test_a_deleted_adapter_leaves_no_series_of_its_embeddings() -> None:
    """The count of its embeddings stayed for as long as the server ran."""
    state = server_state(FakeEngine(), adapter("poet"))
    ask(create_app(state), "POST", PATH, json={"model": "poet", "input": "hello"})
    samples = [sample for metric in state.metrics.registry.collect() for sample in metric.samples]
    assert any(sample.labels.get("finish_reason") == "embedding" for sample in samples)
    state.metrics.forget_adapter("poet")
    samples = [sample for metric in state.metrics.registry.collect() for sample in metric.samples]
    assert not [sample for sample in samples if sample.labels.get("adapter") == "poet"]
