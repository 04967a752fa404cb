"""What is wrong with a body is told in the server's own words: the field, what its value is, what it should be."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import httpx
import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core._pydantic_core import list_all_errors

from server.api.app import create_app
from server.api.validation import invalid_request, validation_error
from tests.fakes import BASE, FakeEngine, ask, server_state

CHAT = "/v1/chat/completions"


class Item(BaseModel):
    model_config = ConfigDict(strict=True)
    size: int


class Body(BaseModel):
    model_config = ConfigDict(strict=True)
    text: str | list[str] = ""
    either: Item | list[Item] | None = None
    mode: Literal["fast", "exact"] = "fast"
    number: Annotated[float, Field(ge=0, lt=2)] = 0
    names: Annotated[list[Annotated[str, Field(max_length=3)]], Field(min_length=1)] = Field(default_factory=list)


def details(body: object) -> list[ErrorDetails]:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(body)
    found = caught.value.errors()
    return [{**detail, "loc": ("body", *detail["loc"])} for detail in found]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"text": 3}, "text", "Invalid 'text': it should be a string or an array, and it is 3."),
        ({"text": {}}, "text", "Invalid 'text': it should be a string or an array, and it is an object."),
        ({"text": ["a", None]}, "text[1]", "Invalid 'text[1]': it should be a string, and it is null."),
        ({"either": [{"size": "1"}]}, "either[0].size", "it should be an integer, and it is a string."),
        ({"either": {"size": 1.5}}, "either.size", "it should be an integer, and it is 1.5."),
        ({"either": {}}, "either.size", "Missing required parameter: 'either.size'."),
        ({"mode": "slow"}, "mode", "it should be 'fast' or 'exact', and it is another."),
        ({"number": 2.5}, "number", "it should be less than 2.0, and it is 2.5."),
        ({"number": -1}, "number", "it should be at least 0.0, and it is -1."),
        ({"number": 10**400}, "number", "it should be a number, and it is a very large integer."),
        ({"number": float("inf")}, "number", "it should be less than 2.0, and it is not."),
        ({"number": True}, "number", "it should be a number, and it is true or false."),
        ({"names": []}, "names", "it should have at least 1 item, and it has 0."),
        ({"names": ["long"]}, "names[0]", "it should have at most 3 characters, and it has 4."),
    ],
)
def test_field_value_and_what_is_wanted_are_named(body: dict[str, Any], param: str, message: str) -> None:
    error = validation_error(details(body), body)
    assert error.param == param
    assert message in str(error)
    assert len(str(error)) < 300


def test_no_sentence_of_the_library_is_shown() -> None:
    """Its messages begin in upper case, our own in lower case."""
    for known in list_all_errors():
        context = dict(known.get("example_context") or {})
        message = known["message_template_python"].format(**{**context, "expected_plural": "s"})
        assert not message[:1].islower()
        detail = {"type": known["type"], "loc": ("body", "field"), "msg": message, "input": "x", "ctx": context}
        shown = str(invalid_request(detail))
        assert message not in shown
        assert "Input" not in shown and " valid " not in shown.replace("valid Unicode", "")
        assert "'field'" in shown


def post(content: bytes | str, **headers: str) -> httpx.Response:
    application = create_app(server_state(FakeEngine()))
    return ask(application, "POST", CHAT, content=content, headers={"content-type": "application/json", **headers})


def test_the_length_of_a_string_is_told_in_characters() -> None:
    """Where a validator of ours comes before the limit, pydantic counts items."""
    format = {"type": "json_schema", "json_schema": {"name": "n" * 65, "schema": {}}}
    error = post(json.dumps({"model": BASE, "messages": [], "response_format": format})).json()["error"]
    assert error["code"] == "string_above_max_length"
    assert "it should have at most 64 characters, and it has 65" in error["message"]


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('{"model": }', "line 1, column 11", "a value is expected there"),
        ('{\n "model": "x"\n "n": 1}', "line 3, column 2", "a ',' or the end of the array or object is expected"),
        ('{"a": 1,}', "line 1, column 9", "a name in double quotes is expected there"),
        ('{"a" 1}', "line 1, column 6", "a ':' is expected there"),
        ('{"a": "b', "line 1, column 7", "has no end"),
        ('{"a": "\n"}', "line 1, column 8", "control character"),
        ('{"a": "\\q"}', "line 1, column 8", "escape"),
        ("{}\n\n{}", "line 3, column 1", "more behind the end"),
        ("{'a': 1}", "line 1, column 2", "double quotes"),
    ],
)
def test_wrong_json_is_told_with_line_and_column(text: str, place: str, reason: str) -> None:
    reply = post(text)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_json", None)
    assert place in error["message"]
    assert reason in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "x"},
        {"messages": [3]},
        {"messages": {}},
        {"messages": [{"role": "user", "content": [3]}]},
        {"messages": [{"role": "user", "content": {"text": "x"}}]},
        {"messages": [{"role": 3, "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": "x"}]},
        {"model": None},
        {"model": []},
        {"n": "1"},
        {"stop": [[1]]},
        {"stop": 3},
        {"stream": "yes"},
        {"stream_options": 3},
        {"logit_bias": []},
        {"temperature": {}},
        {"seed": 1.5},
        {"max_tokens": []},
        {"user": 3},
    ],
)
def test_no_answer_of_the_server_has_a_sentence_of_the_library(change: dict[str, Any]) -> None:
    reply = post(json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x"}], **change}))
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"].partition(".")[0].partition("[")[0] in change
    assert not any(
        words in error["message"] for words in ("Input", " valid ", "dictionary", "pydantic", "Field required")
    )


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "an array"), ("3", "an integer"), ('"x"', "a string"), ("null", "null")]
)
def test_a_body_that_is_no_object_says_what_it_is(text: str, kind: str) -> None:
    assert post(text).json()["error"]["message"].startswith("The request body must be a JSON object")
