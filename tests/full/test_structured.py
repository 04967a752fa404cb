"""200 random schemas whose longest document fits: every answer is valid, of micro and of SmolLM2."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI

from tests.constrained_answers import check_answers
from tests.serving import ROOT, ServerProcess, running_server

NUM_SCHEMAS = 200
BOMBS = [
    {"type": "integer", "multipleOf": 1_000_003},
    {"allOf": [{"type": "string", "pattern": f"a{{{number}}}b*"} for number in range(40)]},
    {"enum": [f"v{number}" for number in range(100_000)]},
    {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(5000)}},
    {"type": "string", "minLength": 100_000_000},
    {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    {"$ref": "http://127.0.0.1:9/schema.json"},
]


@pytest.mark.parametrize("base", ["micro", "smollm2"])
def test_200_random_schemas_get_valid_answers(base: str, request: pytest.FixtureRequest) -> None:
    if base == "smollm2":
        request.getfixturevalue("smollm2")
    with (
        running_server("--base-model", base, "--adapters-dir", str(ROOT / "adapters")) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client,
    ):
        check_answers(client, base, range(NUM_SCHEMAS))


def _attack(server: ServerProcess, schema: object) -> int:
    body = {"model": "micro", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "guided_json": schema}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code


def test_others_are_served_while_schemas_are_refused() -> None:
    """Probes answer, and a stream goes on, while every bomb is sent twice."""
    with running_server("--base-model", "micro", "--no-demo-adapters") as server, ThreadPoolExecutor(16) as pool:
        body = {"model": "micro", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
        attacks = [pool.submit(_attack, server, schema) for schema in BOMBS * 2]
        waits = []
        while not all(attack.done() for attack in attacks):
            since = time.perf_counter()
            assert httpx.get(f"{server.url}/health").status_code == 200
            waits.append(time.perf_counter() - since)
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
        statuses = [attack.result() for attack in attacks]
        print(f"{len(waits)} probes, the slowest {max(waits):.3f} s; answers {statuses}")
        assert set(statuses) <= {200, 400, 503}
        assert sorted(waits)[len(waits) * 9 // 10] < 0.5
