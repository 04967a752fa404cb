"""Fields that constrain answers: which grammar they ask for, what is refused, and that others are served meanwhile."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.api.generation import Prompts
from server.api.protocol import ChatRequest, CompletionRequest
from server.api.structured import with_grammar
from server.errors import InvalidRequest, ServerOverloaded
from server.text.grammar.compiler import NUM_THREADS, GrammarCompiler
from server.text.grammar.grammar import choice, json_object, json_schema, regex, rules
from server.text.grammar.schema import FORMATS, KEYWORDS, REFUSED_FORMATS, REFUSED_KEYWORDS, Source
from server.text.prompt import PromptRenderer
from tests.fakes import encode, small_tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def source(field: str) -> Source:
    return Source(field, f"'{field}'")


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, json_object(Source("response_format", "response_format"))),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            json_schema(SCHEMA, Source("response_format", "response_format 'n'")),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            json_object(Source("response_format", "response_format")),
        ),
        ({"guided_json": SCHEMA}, json_schema(SCHEMA, source("guided_json"))),
        ({"guided_json": '{"type": "object"}'}, json_schema({"type": "object"}, source("guided_json"))),
        ({"guided_regex": "a+"}, regex("a+", source("guided_regex"))),
        ({"guided_choice": ["a", "b"]}, choice(["a", "b"], source("guided_choice"))),
        ({"guided_grammar": 'root ::= "a"'}, rules('root ::= "a"', source("guided_grammar"))),
        ({"structured_outputs": {"json": SCHEMA}}, json_schema(SCHEMA, source("structured_outputs.json"))),
        ({"structured_outputs": {"json_object": True}}, json_object(source("structured_outputs.json_object"))),
        ({"structured_outputs": {"regex": "a"}}, regex("a", source("structured_outputs.regex"))),
    ],
)
def test_a_field_asks_for_its_grammar(fields: dict[str, Any], grammar: object) -> None:
    assert chat(**fields).answer_grammar() == grammar
    completion = CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})
    assert completion.answer_grammar() == grammar
    assert completion.is_constrained or grammar is None


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}}},
        {"guided_json": "{"},
        {"guided_json": "[" * 100_000},
        {"guided_json": 3},
        {"guided_choice": "a"},
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


@pytest.mark.parametrize("fields", [{"guided_choice": []}, {"guided_regex": ""}, {"guided_regex": "a" * 20_000}])
def test_an_empty_or_too_large_constraint_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        chat(**fields).answer_grammar()


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
        {"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]},
    ],
)
def test_two_constraints_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="one field constrains an answer") as refused:
        chat(**fields).answer_grammar()
    assert refused.value.param == "guided_choice"


def test_text_beside_a_constraint_is_none() -> None:
    body = chat(response_format={"type": "text"}, guided_regex="a")
    assert body.answer_grammar() == regex("a", source("guided_regex"))


def test_the_documentation_lists_what_a_schema_may_hold() -> None:
    text = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (`.*`) \|$", text, re.MULTILINE))
    for row, names in (
        ("honoured", KEYWORDS),
        ("refused", REFUSED_KEYWORDS),
        ("formats honoured", FORMATS),
        ("formats refused", REFUSED_FORMATS),
    ):
        assert rows[row].split(", ") == [f"`{name}`" for name in sorted(names)]


def prompts() -> Prompts:
    return Prompts([encode("x")], PromptRenderer(small_tokenizer()), "messages")


def test_without_a_field_nothing_is_constrained() -> None:
    assert not chat().is_constrained
    assert not chat(response_format=None).is_constrained


async def test_a_constraint_is_compiled_once_for_equal_requests() -> None:
    compiler, asked = GrammarCompiler(), prompts()
    first = await with_grammar(chat(guided_json=SCHEMA), asked, compiler)
    second = await with_grammar(chat(guided_json=dict(SCHEMA)), asked, compiler)
    assert first.grammar is not None
    assert second.grammar is first.grammar


async def test_behind_slow_schemas_a_request_is_told_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow ones are refused, and the event loop goes on."""
    monkeypatch.setattr("server.api.structured.MAX_SECONDS", 0.2)
    release = threading.Event()
    compiler, asked = GrammarCompiler(), prompts()
    monkeypatch.setattr(compiler, "compile", lambda grammar, tokenizer: release.wait(20))
    requests = [
        asyncio.create_task(with_grammar(chat(guided_json=SCHEMA), asked, compiler)) for _ in range(NUM_THREADS + 1)
    ]
    results = await asyncio.gather(*requests, return_exceptions=True)
    release.set()
    assert [type(result) for result in results] == [*[InvalidRequest] * NUM_THREADS, ServerOverloaded]
