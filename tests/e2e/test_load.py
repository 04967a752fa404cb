"""The load generator against a real server: what it counts is what was asked and answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.parts.load_report import summary
from benchmarks.parts.raw_client import closed_loop, http_request
from tests.serving import ServerProcess


@pytest.mark.parametrize("how", [["--clients", "3"], ["--rate", "200"]])
def test_a_load_on_adapters_is_answered_and_counted(server: ServerProcess, how: list[str]) -> None:
    asked = ["--models", "json", "tolstoy", "--requests", "8", "--warm-up", "2", "--prompt-tokens", "40"]
    options = load.parse(["--url", server.url, *asked, "--output-tokens", "6", *how])
    records, since, until = asyncio.run(load.measure_once(options))
    figures = summary(records, since, until)
    assert (figures["requests"], figures["errors"]) == (8, {})
    assert 0 < figures["output_tokens"] <= 8 * 6
    assert all(0 < record.to_first <= record.until - record.since for record in records)
    assert figures["prompt_tokens"] / 8 == pytest.approx(40, rel=0.3)


def test_prompts_of_token_ids_are_exactly_as_long_as_asked(server: ServerProcess, tmp_path: Path) -> None:
    asked = ["--models", "micro", "--requests", "3", "--warm-up", "0", "--vocab-size", "4096", "--output-tokens", "4"]
    options = load.parse(["--url", server.url, *asked, "--prompt-tokens", "33"])
    records, _, _ = asyncio.run(load.measure_once(options))
    assert [record.num_prompt_tokens for record in records] == [33] * 3


def test_a_model_that_is_not_there_is_an_error_of_its_kind(server: ServerProcess) -> None:
    asked = ["--models", "absent", "--requests", "2", "--warm-up", "0", "--vocab-size", "4096"]
    records, _, _ = asyncio.run(load.measure_once(load.parse(["--url", server.url, *asked])))
    assert [record.error for record in records] == ["HTTP 404"] * 2


def test_the_raw_client_counts_what_the_server_says(server: ServerProcess) -> None:
    body = {"model": "micro", "prompt": "The river", "max_tokens": 8, "temperature": 0, "stream": True}
    url = f"{server.url}/v1/completions"
    request = http_request(url, body | {"stream_options": {"include_usage": True}})
    alone = asyncio.run(closed_loop(url, [request], 1))
    assert 0 < alone <= 8
    assert asyncio.run(closed_loop(url, [request] * 5, 2)) == 5 * alone
